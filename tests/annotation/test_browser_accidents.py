# SPDX-License-Identifier: Apache-2.0
"""What happens to raters in a real browser: a second click or tab, a pause that ends elsewhere, a broken file."""

import pytest
from playwright.sync_api import expect

from tests.annotation.pages import RaterPage, failures_of
from tests.annotation.served import make_study, png, running
from tests.annotation.test_browser_pages import last_choices, link, make_videos
from tests.browsers import open_context
from trl_sipo.annotation.records import Comparison, Study
from trl_sipo.annotation.store import MEDIA_FOLDER, STUDY_FILE, Store

# Presses twice: the second time as soon as the next pair is there.
_PRESS_TWICE = """async (press) => {
    const arms = document.getElementById("arms");
    const before = document.getElementById("position-text").textContent;
    const isNew = () => document.getElementById("position-text").textContent !== before;
    const again = () => press === "click" ? document.getElementById("choose-left").click()
        : document.dispatchEvent(new KeyboardEvent("keydown", { key: press, bubbles: true }));
    again();
    while (!isNew() || arms.getAttribute("aria-busy") === "true") await new Promise((r) => setTimeout(r, 5));
    again();
}"""


def test_a_double_press_answers_one_pair(browser, tmp_path):
    """The second of two presses comes when the next pair is there, which nobody can have looked at."""
    store, tokens = make_study(tmp_path / "study", num_pairs=4)
    with running(store) as server, open_context(browser) as context:
        rater = RaterPage(context, link(server, tokens["anna"])).begin()
        for number, press in enumerate(("click", "ArrowRight", "n"), 2):
            rater.page.evaluate(_PRESS_TWICE, press)
            rater.is_at(number)
        rater.press("t").has_answered(3, 4)
        assert failures_of(context) == []
    assert last_choices(store) == ["left", "right", "skip", "tie"] and len(store.answers()) == 4


@pytest.mark.slow
def test_time_runs_again_after_a_pause_that_ended_in_signing_in(browser, tmp_path):
    """Else every later answer would have taken no time, for which a rater is left out."""
    store, tokens = make_study(tmp_path / "study")
    with running(store) as server, open_context(browser) as context:
        rater = RaterPage(context, link(server, tokens["anna"])).begin().press("Escape")
        context.clear_cookies()
        rater.page.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")
        rater.locate("#token").fill(tokens["anna"])
        rater.locate("#token").press("Enter")
        rater.begin().press("ArrowLeft").has_answered(1, 3)
    assert store.answers()[0].seconds > 0.2  # before which no answer is taken


@pytest.mark.slow
def test_a_second_tab_ends_neither_the_pause_nor_the_place_of_the_first(browser, tmp_path):
    store, tokens = make_study(tmp_path / "study", num_pairs=4)
    with running(store) as server, open_context(browser) as context:
        first = RaterPage(context, link(server, tokens["anna"])).begin().press("a").is_at(2).press("a").is_at(3)
        first.press("p").is_at(2).press("p").is_at(1)
        second = RaterPage(context, link(server, tokens["anna"]))
        expect(second.locate("#start-button")).to_have_text("Go on with pair 3")
        with first.page.expect_response(lambda response: response.status == 403):
            first.press("b").is_at(2)  # by a page of the session before
        first.press("Escape")
        with first.page.expect_response("**/api/answer") as answered:
            pass
        assert answered.value.status == 200
        expect(first.locate("#pause-title")).to_be_visible()
        first.page.keyboard.press("Escape")
        first.is_at(2)
        assert failures_of(context) == []
    assert last_choices(store) == ["right", "left", None, None]


@pytest.mark.slow
def test_signing_out_signs_out_also_where_another_tab_has_signed_in_anew(browser, tmp_path):
    store, tokens = make_study(tmp_path / "study")
    with running(store) as server, open_context(browser) as context:
        first = RaterPage(context, link(server, tokens["anna"])).begin()
        second = RaterPage(context, link(server, tokens["ben"]))
        expect(second.locate("#start-button")).to_have_text("Start")
        first.locate("#help-button").click()
        first.locate("#sign-out").click()
        expect(first.locate("#sign-in-title")).to_be_visible()
        assert context.cookies() == []
        second.locate("#help-button").click()
        second.locate("#sign-out").click()  # which the first has done
        expect(second.locate("#sign-in-title")).to_be_visible()
        assert failures_of(context) == []


@pytest.mark.slow
def test_a_long_prompt_is_scrolled_by_keys_and_not_voted_on(browser, tmp_path):
    (tmp_path / MEDIA_FOLDER).mkdir()
    store = Store.create(tmp_path / STUDY_FILE, Study(title="Long"))
    for name in ("1a.png", "1b.png"):
        (tmp_path / MEDIA_FOLDER / name).write_bytes(png((9, 99, 9)))
    pairs = [(f"pair-{number}", "sneaker " * words) for number, words in enumerate((900, 1))]
    store.add_pairs([Comparison(name, name, text, "", "a", "b", "1a.png", "1b.png") for name, text in pairs])
    with running(store) as server, open_context(browser) as context:
        rater = RaterPage(context, link(server, store.invite("anna", 1))).begin()
        for _ in range(2):
            is_long = len(rater.locate("#prompt").text_content()) > 100
            rater.locate("#prompt").focus()
            rater.press("ArrowDown")
            if is_long:
                rater.page.wait_for_function("() => document.getElementById('prompt').scrollTop > 0")
                assert "skip" not in last_choices(store) and rater.locate("#pair").is_visible()
                rater.press("n")
        expect(rater.locate("#finished-title")).to_have_text("Nearly done")
    assert sorted(last_choices(store)) == ["skip", "tie"]


@pytest.mark.slow
def test_a_sample_that_came_broken_is_fetched_again(browser, tmp_path):
    store, tokens = make_study(tmp_path / "study")
    rater_id = store.rater_of(tokens["anna"]).rater_id
    broken = store.media_folder / store.assignments(rater_id)[0].left_media
    content = broken.read_bytes()
    broken.write_bytes(b"no picture")
    with running(store) as server, open_context(browser) as context:
        rater = RaterPage(context, link(server, tokens["anna"]))
        rater.locate("#start-button").click()
        expect(rater.locate("#loading-text")).to_contain_text("cannot be shown")
        broken.write_bytes(content)
        rater.locate("#retry-button").click()
        rater.press("ArrowLeft").has_answered(1, 3)


@pytest.mark.slow
def test_videos_of_earlier_pairs_are_let_go_of(browser, tmp_path):
    """A browser refuses to play after so many that were not."""
    store, token = make_videos(tmp_path / "study")
    with running(store) as server, open_context(browser) as context:
        rater = RaterPage(context, link(server, token)).begin()
        rater.page.evaluate("() => { window.earlier = [...document.querySelectorAll('video')]; }")
        rater.press("ArrowLeft").is_at(2)
        left = rater.page.evaluate(
            "() => window.earlier.map((video) => [video.hasAttribute('src'), video.readyState])"
        )
        assert left == [[False, 0], [False, 0]]
        expect(rater.locate("#play-button")).to_contain_text("Stop")
        assert failures_of(context) == []


@pytest.mark.slow
def test_videos_stand_still_while_the_page_is_hidden(browser, tmp_path):
    store, token = make_videos(tmp_path / "study")
    with running(store) as server, open_context(browser) as context:
        rater = RaterPage(context, link(server, token)).begin()
        expect(rater.locate("#play-button")).to_contain_text("Stop")
        for is_hidden, says in ((True, "Play"), (False, "Stop")):
            rater.page.evaluate(
                """(isHidden) => {
                    Object.defineProperty(document, "hidden", { value: isHidden, configurable: true });
                    document.dispatchEvent(new Event("visibilitychange"));
                }""",
                is_hidden,
            )
            expect(rater.locate("#play-button")).to_contain_text(says)
            paused = rater.page.evaluate("() => [...document.querySelectorAll('video')].map((video) => video.paused)")
            assert paused == [is_hidden] * 2
        assert failures_of(context) == []
