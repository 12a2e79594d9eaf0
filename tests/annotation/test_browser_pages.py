# SPDX-License-Identifier: Apache-2.0
"""The page of a study in a real browser: what it shows, keeps, forgets and survives."""

import json

import numpy as np
import pytest
from playwright.sync_api import expect

from tests.annotation.pages import RaterPage, failures_of
from tests.annotation.served import FIRST_MODEL, SECOND_MODEL, make_study, png, running
from tests.browsers import PHONE, open_context
from trl_sipo.annotation.application import Limits
from trl_sipo.annotation.records import Comparison, Study
from trl_sipo.annotation.serving import Address, url_of
from trl_sipo.annotation.store import MEDIA_FOLDER, STUDY_FILE, Store
from trl_sipo.data.video_writing import encode_video

SCRIPT = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>{{7*7}}${7*7}\'"</p>'


def link(server, token=""):
    return url_of("127.0.0.1", server.port) + (f"#token={token}" if token else "")


def last_choices(store, name="anna"):
    """In the order in which the rater sees the pairs."""
    rater = next(rater for rater in store.raters() if rater.name == name)
    choices = store.choices(rater.rater_id)
    return [choices.get(assignment.assignment_id) for assignment in store.assignments(rater.rater_id)]


def make_videos(folder, *, num_pairs=2, frames=(12, 12), rate=12.0):
    """A study of short clips, whose halves of grey tell the frame."""
    (folder / MEDIA_FOLDER).mkdir(parents=True)
    store = Store.create(folder / STUDY_FILE, Study(title="Clips"))
    pairs = []
    for number in range(num_pairs):
        names = [f"{number}{arm}.mp4" for arm in "ab"]
        for name, length in zip(names, frames, strict=True):
            levels = np.linspace(0, 255, length).astype(np.uint8)
            clip = np.broadcast_to(levels[:, None, None, None], (length, 32, 48, 3))
            encode_video(folder / MEDIA_FOLDER / name, np.ascontiguousarray(clip), rate, for_browsers=True)
        pairs.append(
            Comparison(f"pair-{number}", f"prompt-{number}", "a sneaker moves", "", "a", "b", *names, is_video=True)
        )
    store.add_pairs(pairs)
    return store, store.invite("anna", 1)


def test_texts_of_a_study_are_shown_and_never_run(browser, tmp_path):
    """Prompt, category, title, question, guidelines and a rater's name."""
    (tmp_path / MEDIA_FOLDER).mkdir()
    texts = {"title": f"T{SCRIPT}", "question": f"Q{SCRIPT}", "guidelines": f"G{SCRIPT}\n- L{SCRIPT}"}
    store = Store.create(tmp_path / STUDY_FILE, Study(**texts, is_blind=False))
    for name in ("1a.png", "1b.png"):
        (tmp_path / MEDIA_FOLDER / name).write_bytes(png((9, 9, 9)))
    names = (f"A{SCRIPT}", f"B{SCRIPT}")
    store.add_pairs([Comparison("pair", "prompt", f"P{SCRIPT}", f"C{SCRIPT}", *names, "1a.png", "1b.png")])
    token = store.invite(SCRIPT[:80], 1)
    with running(store) as server, open_context(browser) as context:
        rater = RaterPage(context, link(server, token))
        expect(rater.locate("#guidelines-text")).to_have_text(f"G{SCRIPT}L{SCRIPT}")
        rater.begin()
        for selector, first in (("#prompt", "P"), ("#category", "C"), ("#question", "Q"), ("#title", "T")):
            expect(rater.locate(selector)).to_have_text(f"{first}{SCRIPT}")
        expect(rater.locate("#left .name, #right .name")).to_have_count(2)
        assert {rater.locate(f"#{side} .name").text_content() for side in ("left", "right")} == set(names)
        rater.press("?")
        assert rater.page.evaluate("() => window.hacked") is None
        assert rater.locate("main img, main script").count() == 2  # the samples
        assert failures_of(context) == []


@pytest.mark.slow
def test_a_place_is_kept_through_going_back_reloading_and_another_device(browser, tmp_path):
    store, tokens = make_study(tmp_path / "study", num_pairs=4)
    with running(store) as server, open_context(browser) as context, open_context(browser) as other_context:
        rater = RaterPage(context, link(server, tokens["anna"])).begin()
        rater.press("ArrowLeft").is_at(2).press("n").is_at(3).press("ArrowDown").is_at(4)
        rater.press("p").is_at(3).press("Backspace").is_at(2).press("p").is_at(1)
        expect(rater.locate("#choose-left")).to_have_attribute("aria-pressed", "true")
        expect(rater.locate("#left .mark")).to_be_visible()
        rater.press("2").is_at(2).says("Saved")
        rater.page.reload()
        rater.is_at(4)
        second = RaterPage(other_context, link(server, tokens["anna"]))
        expect(second.locate("#start-button")).to_have_text("Go on with pair 4")
        second.begin().is_at(4).press("b")
        expect(second.locate("#finished-title")).to_have_text("Nearly done")
        second.has_answered(3, 4).locate("#skipped-button").click()
        second.is_at(2).press("t").is_done()
        assert failures_of(context) == failures_of(other_context) == []
    assert last_choices(store) == ["right", "tie", "tie", "right"]
    assert len(store.answers()) == 6


def test_signing_in_by_hand_and_out_again(browser, tmp_path):
    store, tokens = make_study(tmp_path / "study")
    with running(store) as server, open_context(browser) as context:
        rater = RaterPage(context, link(server))
        rater.locate("#token").fill("no such invitation")
        rater.locate("#token").press("Enter")
        expect(rater.locate("#sign-in-problem")).to_contain_text("This invitation is not known")
        rater.locate("#token").fill(f"  {tokens['anna']} ")
        rater.locate("#token").press("Enter")
        rater.begin().press("a").says("Saved")
        rater.locate("#help-button").click()
        expect(rater.locate("#signed-in-as")).to_have_text("Signed in as anna.")
        rater.locate("#sign-out").click()
        expect(rater.locate("#sign-in-title")).to_be_visible()
        assert context.cookies() == [] and rater.page.evaluate("() => sessionStorage.length") == 0
        rater.locate("#token").fill(link(server, tokens["ben"]))  # the whole link
        rater.locate("#token").press("Enter")
        rater.begin().has_answered(0, 3)


@pytest.mark.slow
def test_what_could_not_be_sent_is_sent_after_signing_in_again(browser, tmp_path):
    """Sessions end with the key; the answer waits in the page, through a reload too."""
    store, tokens = make_study(tmp_path / "study")
    with open_context(browser) as context:
        with running(store) as server:
            port = server.port
            rater = RaterPage(context, link(server, tokens["anna"])).begin()
            rater.press("ArrowRight").is_at(2).says("Saved")
        (store.path.parent / "server.key").unlink()
        rater.press("ArrowLeft").says("1 answer is not saved yet. Trying again…")
        with running(store, address=Address(port=port)) as server:
            expect(rater.locate("#sign-in-title")).to_be_visible()
            expect(rater.locate("#sign-in-problem")).to_contain_text("your last answers are kept")
            rater.page.on("dialog", lambda dialog: dialog.accept())
            rater.page.goto("about:blank")
            rater.page.goto(link(server, tokens["anna"]))
            rater.begin().has_answered(2, 3)
    assert last_choices(store) == ["right", "left", None]


@pytest.mark.slow
def test_answers_of_one_rater_are_not_sent_as_those_of_the_next(browser, tmp_path):
    store, tokens = make_study(tmp_path / "study")
    with open_context(browser) as context:
        with running(store) as server:
            port = server.port
            rater = RaterPage(context, link(server, tokens["anna"])).begin()
        rater.press("ArrowLeft").says("1 answer is not saved yet. Trying again…")
        (store.path.parent / "server.key").unlink()
        with running(store, address=Address(port=port)) as server:
            expect(rater.locate("#sign-in-title")).to_be_visible()
            statuses = []
            rater.page.on("response", lambda response: statuses.append(response.status))
            rater.locate("#token").fill(tokens["ben"])
            rater.locate("#token").press("Enter")
            rater.begin().press("ArrowRight").has_answered(1, 3)
            assert statuses and 404 not in statuses
            assert rater.page.evaluate("() => sessionStorage.getItem('unsent')") == "[]"
    assert last_choices(store) == [None] * 3 and last_choices(store, "ben")[0] == "right"


@pytest.mark.slow
def test_an_answer_whose_acknowledgement_is_lost_is_stored_once(browser, tmp_path):
    store, tokens = make_study(tmp_path / "study")
    with running(store) as server, open_context(browser) as context:
        rater = RaterPage(context, link(server, tokens["anna"])).begin()
        lost = []

        def lose_the_first(route):
            if lost:
                route.fallback()
            else:
                lost.append(route.fetch().status)
                route.abort()

        rater.page.route("**/api/answer", lose_the_first)
        rater.press("ArrowLeft").has_answered(1, 3)
    assert lost == [200] and [answer.choice for answer in store.answers()] == ["left"]


@pytest.mark.slow
def test_a_server_that_asks_to_wait_is_waited_for(browser, tmp_path):
    store, tokens = make_study(tmp_path / "study", num_pairs=6)
    with running(store, limits=Limits(answers=(2, 1.0))) as server, open_context(browser) as context:
        rater = RaterPage(context, link(server, tokens["anna"])).begin()
        for number in range(6):
            rater.is_at(number + 1).press("ArrowLeft")
        rater.is_done()
    assert last_choices(store) == ["left"] * 6 and len(store.answers()) == 6


@pytest.mark.slow
def test_time_stands_still_in_pauses_help_and_hidden_pages(browser, tmp_path):
    store, tokens = make_study(tmp_path / "study")
    with running(store) as server, open_context(browser) as context:
        context.clock.install()
        rater = RaterPage(context, link(server, tokens["anna"])).begin()
        rater.page.clock.pause_at("2100-01-01")
        rater.page.reload()
        expect(rater.locate("#arms")).to_have_attribute("aria-busy", "false")
        rater.page.clock.run_for(4000)
        rater.press("Escape")
        expect(rater.locate("#pause-title")).to_be_focused()
        rater.page.clock.run_for(60_000)
        rater.page.keyboard.press("Escape")
        rater.page.clock.run_for(2000)
        rater.press("?")
        rater.page.clock.run_for(70_000)
        rater.locate("#close-help").click()
        _set_hidden(rater.page, "hidden")
        rater.page.clock.run_for(80_000)
        _set_hidden(rater.page, "visible")
        rater.page.clock.run_for(1000)
        rater.press("ArrowLeft")
        expect(rater.locate("#position-text")).to_have_text("· pair 2")
        expect(rater.locate("#arms")).to_have_attribute("aria-busy", "false")
        rater.page.clock.run_for(3000)
        rater.press("ArrowRight").has_answered(2, 3)
    assert [answer.seconds for answer in store.answers()] == pytest.approx([7.0, 3.0], abs=0.5)


def _set_hidden(page, state):
    page.evaluate(
        """(state) => {
            Object.defineProperty(document, "hidden", { value: state === "hidden", configurable: true });
            document.dispatchEvent(new Event("visibilitychange"));
        }""",
        state,
    )


@pytest.mark.slow
def test_keys_alone_do_all(browser, tmp_path):
    store, tokens = make_study(tmp_path / "study")
    with running(store) as server, open_context(browser) as context:
        rater = RaterPage(context, link(server, tokens["anna"]))
        page = rater.page
        expect(rater.locate("#guidelines-title")).to_be_focused()
        _tab_to(page, "start-button")
        page.keyboard.press("Enter")
        rater.ready()
        expect(rater.locate("#question")).to_be_focused()
        _tab_to(page, "choose-right")
        page.keyboard.press("Space")  # presses the button that has the focus
        rater.is_at(2)
        expect(rater.locate("#question")).to_be_focused()  # so that the same key does not vote again
        page.keyboard.press("Space")
        page.keyboard.press("Control+ArrowLeft")
        page.keyboard.down("ArrowLeft")
        page.keyboard.down("ArrowLeft")  # held: repeated, and counted once
        page.keyboard.up("ArrowLeft")
        rater.is_at(3).press("z")
        expect(rater.locate("#zoom-button")).to_have_attribute("aria-pressed", "true")
        rater.press("Escape")
        expect(rater.locate("#zoom-button")).to_have_attribute("aria-pressed", "false")
        rater.press("?")
        expect(rater.locate("#help")).to_be_visible()
        page.keyboard.press("ArrowLeft")  # in the help, no answer
        page.keyboard.press("Escape")
        expect(rater.locate("#help")).to_be_hidden()
        rater.press("0").is_done()
        assert failures_of(context) == []
    assert last_choices(store) == ["right", "left", "tie"]


def _tab_to(page, target):
    """Go there with the tabulator, past elements each of which shows that it has the focus."""
    for _ in range(20):
        page.keyboard.press("Tab")
        name, style = page.evaluate(
            "() => [document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]"
        )
        assert style == "solid" or name == "", name
        if name == target:
            return
    raise AssertionError(f"{target} cannot be reached")


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_a_phone_and_can_be_read(browser, tmp_path, dark):
    store, tokens = make_study(tmp_path / "study")
    with (
        running(store) as server,
        open_context(browser, viewport=PHONE, is_phone=True, dark=dark) as context,
    ):
        rater = RaterPage(context, link(server, tokens["anna"]))
        expect(rater.locate("#start-button")).to_be_visible()
        _check_sizes(rater.page)
        rater.begin()
        _check_sizes(rater.page)
        first, second = _frames(rater)
        assert first["y"] + first["height"] <= second["y"] and first["height"] > 150
        last = rater.locate("#next-button").bounding_box()
        assert last["y"] + last["height"] <= PHONE["height"]
        rater.locate("#left .frame").tap()
        expect(rater.locate("#arms")).to_have_class("zoomed")
        rater.locate("#left .frame").tap()
        expect(rater.locate("#arms")).not_to_have_class("zoomed")
        rater.locate("#choose-left").tap()
        rater.is_at(2).locate("#previous-button").tap()
        _frames(rater.is_at(1))
        rater.page.set_viewport_size({"width": PHONE["height"], "height": PHONE["width"]})
        first, second = _frames(rater)
        assert first["x"] + first["width"] <= second["x"] and first["height"] > 140
        _check_sizes(rater.page)
        rater.locate("#pause-button").tap()
        _check_sizes(rater.page)


def _frames(rater):
    """Where both samples are shown: as large as one another, so that nothing but their content differs."""
    first, second = (rater.locate(f"#{side} .frame").bounding_box() for side in ("left", "right"))
    assert (first["width"], first["height"]) == pytest.approx((second["width"], second["height"]), abs=0.5)
    return first, second


def _check_sizes(page):
    """Nothing to scroll sideways for, buttons that a thumb meets, and texts with a contrast of at least 4.5."""
    found = page.evaluate(
        """() => {
            const level = (text) => {
                const parts = text.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
                const [r, g, b] = parts.map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
            };
            const behind = (element) => {
                for (let e = element; e; e = e.parentElement) {
                    const colour = getComputedStyle(e).backgroundColor;
                    if (!/, 0\\)$/.test(colour)) return colour;
                }
            };
            const isShown = (e) => e.checkVisibility() && e.textContent.trim();
            const texts = [...document.querySelectorAll("h1, h2, p, span, button, dt, dd, label")].filter(isShown);
            const buttons = [...document.querySelectorAll("button")].filter(isShown);
            return {
                sideways: document.documentElement.scrollWidth - innerWidth,
                contrasts: texts.filter((e) => !e.disabled).map((e) => {
                    const [a, b] = [level(getComputedStyle(e).color), level(behind(e))].sort((x, y) => x - y);
                    return [(b + 0.05) / (a + 0.05), e.id || e.textContent];
                }),
                heights: buttons.map((e) => [e.getBoundingClientRect().height, e.id]),
            };
        }"""
    )
    assert found["sideways"] <= 0
    assert len(found["contrasts"]) > 2 and min(found["contrasts"])[0] >= 4.5, min(found["contrasts"])
    assert min(found["heights"])[0] >= 40, min(found["heights"])


@pytest.mark.slow
def test_alternatives_tell_what_is_there_and_nothing_else(browser, tmp_path):
    store, tokens = make_study(tmp_path / "study")
    with running(store) as server, open_context(browser) as context:
        rater = RaterPage(context, link(server, tokens["anna"])).begin()
        images = rater.locate("#arms img")
        assert [images.nth(i).get_attribute("alt") for i in range(2)] == ["Result A", "Result B"]
        assert all(images.nth(i).get_attribute("src").startswith("blob:") for i in range(2))
        assert FIRST_MODEL not in rater.page.content() and SECOND_MODEL not in rater.page.content()
        unnamed = rater.page.evaluate(
            "() => [...document.querySelectorAll('button, input, dialog, section, progress')].filter((e) => "
            "!(e.textContent.trim() || e.labels?.length || e.ariaLabel || e.getAttribute('aria-labelledby')))"
            ".map((e) => e.id)"
        )
        assert set(unnamed) == {"play-button", "skipped-button"}  # hidden until there is something to say
        assert rater.locate("#status").get_attribute("aria-live") == "polite"


@pytest.mark.slow
def test_videos_start_loop_and_stop_together(browser, tmp_path):
    store, token = make_videos(tmp_path / "study")
    with running(store) as server, open_context(browser) as context:
        rater = RaterPage(context, link(server, token)).begin()
        expect(rater.locate("#play-button")).to_contain_text("Stop")
        times = rater.page.evaluate(
            """async () => {
                const videos = [...document.querySelectorAll("video")];
                const seen = [];
                for (let i = 0; i < 60; i += 1) {
                    await new Promise((resolve) => setTimeout(resolve, 50));
                    seen.push(videos.map((video) => video.currentTime));
                }
                return seen;
            }"""
        )
        apart = sorted(abs(first - second) for first, second in times)
        assert apart[len(apart) // 2] < 0.1, apart
        assert any(later[0] < sooner[0] for sooner, later in zip(times, times[1:], strict=False))  # began anew
        rater.press(" ")
        expect(rater.locate("#play-button")).to_contain_text("Play")
        assert rater.page.evaluate("() => [...document.querySelectorAll('video')].every((v) => v.paused && v.muted)")
        rater.press(" ").press("Escape")
        rater.page.keyboard.press("?")
        rater.locate("#close-help").click()  # still a pause
        assert rater.page.evaluate("() => [...document.querySelectorAll('video')].every((v) => v.paused)")
        rater.page.keyboard.press("Escape")
        expect(rater.locate("#play-button")).to_contain_text("Stop")
        rater.press("ArrowLeft").is_at(2)
        expect(rater.locate("#play-button")).to_contain_text("Stop")
        rater.press("ArrowRight").is_done()
        assert failures_of(context) == []


@pytest.mark.slow
def test_videos_of_unequal_length_wait_for_each_other(browser, tmp_path):
    store, token = make_videos(tmp_path / "study", frames=(6, 18))
    with running(store) as server, open_context(browser) as context:
        rater = RaterPage(context, link(server, token)).begin()
        longest = rater.page.evaluate(
            """async () => {
                const videos = [...document.querySelectorAll("video")];
                const longest = [0, 0];
                for (let i = 0; i < 80; i += 1) {
                    await new Promise((resolve) => setTimeout(resolve, 50));
                    videos.forEach((video, side) => (longest[side] = Math.max(longest[side], video.currentTime)));
                }
                return longest;
            }"""
        )
    assert sorted(longest) == pytest.approx([0.5, 1.5], abs=0.15)


@pytest.mark.slow
def test_who_wants_less_motion_starts_videos_by_hand(browser, tmp_path):
    store, token = make_videos(tmp_path / "study")
    with running(store) as server, open_context(browser) as context:
        rater = RaterPage(context, link(server))
        rater.page.emulate_media(reduced_motion="reduce")
        rater.page.goto(link(server, token))  # the same page but for the fragment: it is not loaded again
        rater.begin()
        expect(rater.locate("#play-button")).to_contain_text("Play")
        assert rater.page.evaluate("() => [...document.querySelectorAll('video')].every((v) => v.paused)")


@pytest.mark.slow
def test_a_pair_that_cannot_be_shown_can_be_skipped_or_tried_again(browser, tmp_path):
    store, tokens = make_study(tmp_path / "study")
    rater_id = store.rater_of(tokens["anna"]).rater_id
    broken = store.media_folder / store.assignments(rater_id)[0].left_media
    content = broken.read_bytes()
    broken.write_bytes(b"no picture")
    with running(store) as server, open_context(browser) as context:
        rater = RaterPage(context, link(server, tokens["anna"]))
        rater.locate("#start-button").click()
        expect(rater.locate("#loading-text")).to_contain_text("cannot be shown")
        expect(rater.locate("#choose-left")).to_be_disabled()
        rater.page.keyboard.press("ArrowLeft")
        expect(rater.locate("#answers")).to_have_attribute("aria-busy", "false")
        rater.page.keyboard.press("n")
        rater.is_at(2).press("p")
        expect(rater.locate("#retry-button")).to_be_visible()
        broken.write_bytes(content)
        rater.page.reload()
        rater.is_at(2).press("p").is_at(1).press("ArrowRight").has_answered(1, 3)
    assert last_choices(store) == ["right", None, None]


@pytest.mark.slow
def test_nobody_else_reads_a_page_from_another_site(browser, tmp_path):
    """A page under another name can neither frame the study nor read from it, though the browser is signed in."""
    store, tokens = make_study(tmp_path / "study")
    with (
        running(store) as server,
        running(make_study(tmp_path / "other")[0]) as other,
        open_context(browser) as context,
    ):
        RaterPage(context, link(server, tokens["anna"])).begin()
        page = context.new_page()
        page.goto(link(other))
        told = page.evaluate(
            """async (address) => {
                const tries = [fetch(address), fetch(address, { mode: "no-cors", method: "POST", body: "{}" })];
                return (await Promise.allSettled(tries)).map((result) => result.status);
            }""",
            f"http://localhost:{server.port}/api/study",
        )
        assert told == ["rejected", "rejected"]
    assert json.dumps(store.answers()) == "[]"
