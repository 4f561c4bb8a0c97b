"""Numbers printed by the PRO and RRHF authors' own code."""

import json

import torch

from prefopt_trl.losses import pro, rrhf


def test_pro(shared_dir):
    cases = json.loads((shared_dir / "golden" / "pro.json").read_text())["cases"]
    assert [case["n"] for case in cases] == [2, 3, 5]
    for case in cases:
        sum_logps, token_counts, rewards = (
            torch.tensor(case[key], dtype=torch.float64) for key in ("sum_logps", "token_counts", "rewards")
        )
        mean_logps = sum_logps / token_counts
        # The authors add 1e-10 inside the logarithm, which on these inputs shows in the eighth digit.
        expected = sum(case["rank_losses"])
        torch.testing.assert_close(pro(mean_logps, rewards).mean().item(), expected, rtol=1e-6, atol=0)
        # Without its best completion a ranking loses its first term, so the difference is that term.
        for k, expected in enumerate(case["rank_losses"]):
            term = pro(mean_logps[:, k:], rewards[:, k:])
            if k + 2 < case["n"]:
                term = term - pro(mean_logps[:, k + 1 :], rewards[:, k + 1 :])
            torch.testing.assert_close(term.mean().item(), expected, rtol=1e-6, atol=0)


def test_rrhf(shared_dir):
    cases = json.loads((shared_dir / "golden" / "rrhf.json").read_text())["cases"]
    assert [case["n"] for case in cases] == [2, 4]
    for case in cases:
        mean_logps, rewards = (torch.tensor([case[key]], dtype=torch.float64) for key in ("mean_logps", "rewards"))
        torch.testing.assert_close(rrhf(mean_logps, rewards).item(), case["loss"], rtol=1e-6, atol=0)
