from prefopt_trl.evaluation.metrics import Estimate
from prefopt_trl.evaluation.report import as_percentage, rounded, table, with_error


def test_table_aligns_and_is_markdown():
    assert table(["policy", "reward"], [["a", "1.00 ± 0.10"], ["longer", "2"]]).splitlines() == [
        "| policy |      reward |",
        "| ------ | ----------: |",
        "| a      | 1.00 ± 0.10 |",
        "| longer |           2 |",
    ]


def test_numbers_come_with_their_errors():
    assert with_error(Estimate(1.236, 0.041)) == "1.24 ± 0.04"
    assert with_error(Estimate(-0.00052, 0.000123), ".3g") == "-0.00052 ± 0.000123"
    assert with_error(Estimate(1.0, float("nan"))) == "1.00"
    assert as_percentage(Estimate(0.516, 0.02)) == "52% ± 2%"
    assert as_percentage(Estimate(0.516, float("nan"))) == "52%"
    assert (
        rounded(Estimate(123.456, 1.23)) == "123.5 ± 1.2" and rounded(Estimate(0.5, 0.0123), "+") == "+0.500 ± 0.012"
    )
    assert rounded(Estimate(4.8441, 3e-9)) == "4.844" and rounded(Estimate(0.0, 0.0)) == "0"  # rounding is no error
