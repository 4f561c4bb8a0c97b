"""A rater's page in Chromium, from file://: rated by keyboard, with a hostile completion, and scored."""

import pytest

from prefopt_trl.evaluation.side_by_side import make_pages, score_answers
from tests.side_by_side import write_samples

pytestmark = pytest.mark.browser
ENTER, BACKSPACE = "\ue007", "\ue003"
HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "<svg onload=\"document.title='owned'\">\n\n    <b>kept</b>   spaces &amp; \u2028end"
)


@pytest.fixture(params=[1, 2], ids=["storage", "no storage"])
def driver(request, tmp_path):
    """Chromium with the page of a study of three tasks and policies; their texts begin with "good", "best" or else."""
    from selenium import webdriver

    texts = {"worst": [HOSTILE, "worst", "worst"], "good": ["good"] * 3, "best": ["best", "best " * 3000, "best"]}
    rewards = {name: [float(name == "best")] * 3 for name in texts}
    samples = write_samples(tmp_path / "s.jsonl", texts, rewards, HOSTILE)
    make_pages([samples], tmp_path, num_raters=1, raters_per_task=1)
    options = webdriver.ChromeOptions()
    options.add_argument("--headless=new")
    options.add_argument("--no-sandbox")
    blocks = {"profile.default_content_setting_values.cookies": request.param}  # and storage with them
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "saved"), **blocks})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options) as driver:
        driver.keeps = request.param == 1
        driver.get((tmp_path / "pages" / "rater_1.html").as_uri())
        yield driver


def press(driver, *keys):
    for key in keys:
        driver.switch_to.active_element.send_keys(key)


def test_a_page_is_rated_by_keyboard_and_nothing_of_a_text_runs(driver, tmp_path):
    from selenium.webdriver.support.wait import WebDriverWait

    shown: list[str] = []
    press(driver, ENTER)
    assert driver.find_element("id", "message").text == "Rate the quality of A and B and C first."
    for number in range(3):
        assert driver.find_element("id", "count").text == f"Task {number + 1} of 3"
        assert driver.find_element("css selector", "#prompt .text").get_property("textContent").endswith(HOSTILE)
        cards = driver.find_elements("css selector", ".completion .text")
        shown += (texts := [card.get_property("textContent") for card in cards])
        begins = [text[:4] for text in texts]
        press(driver, *({"good": "4", "best": "5"}.get(begin, "2") for begin in begins), "abc"[begins.index("best")])
        press(driver, ENTER)
        if number == 1 and driver.keeps:  # answers are found again
            driver.refresh()
            assert driver.find_element("id", "rated").text == "2 of 3 rated"
    press(driver, BACKSPACE)
    assert len(driver.find_elements("css selector", "[aria-pressed=true]")) == 4
    press(driver, "n", ENTER)  # answers can be changed
    assert HOSTILE in shown and driver.find_element("id", "end").is_displayed()
    assert driver.title == "Side by side" and driver.get_log("browser") == []  # nothing ran, was loaded or blocked
    assert driver.find_elements("css selector", "img, svg, b:not(#unkept)") == []
    assert driver.find_element("id", "unkept").get_property("hidden") == driver.keeps
    press(driver, ENTER)  # the button that saves has the focus
    saved = WebDriverWait(driver, 10).until(lambda _: list(tmp_path.glob("saved/*.json")))
    scores = score_answers(tmp_path, saved)
    assert (scores["answers"], scores["incomplete_answers"]) == (3, 0)
    assert [scores[f"quality/{name}"].mean for name in ("worst", "good", "best")] == [2, 4, 5]
    assert scores["chosen/best"].mean == scores["agreement/judge"].mean == pytest.approx(2 / 3)
