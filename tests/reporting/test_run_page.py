# SPDX-License-Identifier: Apache-2.0
"""The page of real runs in a real browser: what it shows, with keys and pointer, in all lights and widths."""

import re

import pytest

from tests.browsers import DESKTOP, PHONE, open_context
from tests.reporting.conftest import HOSTILE_PROMPT, STEPS
from tests.reporting.logged_runs import write_clip, write_log
from trl_sipo.cli.main import main
from trl_sipo.reporting.run_report import contrast

# For each visible text, its colour and the first opaque background behind it.
TEXT_COLOURS = """() => [...document.querySelectorAll(`h1,h2,h3,p,li,dt,dd,a,button,summary,figcaption,th,td,code,
    label,output,.which,.chart text`)].filter((e) => e.checkVisibility() && e.textContent.trim()).map((e) => {
    let back = e, colour = "rgba(0, 0, 0, 0)";
    for (; back && /, 0\\)$/.test(colour); back = back.parentElement) colour = getComputedStyle(back).backgroundColor;
    const style = getComputedStyle(e);
    const size = parseFloat(style.fontSize);
    return [e.textContent.trim().slice(0, 30), e.closest("svg") ? style.fill : style.color, colour, size];
})"""
IMAGES = "() => [...document.images].map((image) => [image.alt, image.complete && image.naturalWidth > 0])"
HEADINGS = '() => [...document.querySelectorAll("h1,h2,h3,h4")].map((heading) => Number(heading.tagName[1]))'


def _hex(colour):
    channels = [float(number) for number in re.findall(r"[\d.]+", colour)]
    assert len(channels) == 3 or channels[3] == 1, colour
    return "#" + "".join(f"{round(channel):02x}" for channel in channels[:3])


def _places(path):
    return [float(number) for number in re.findall(r"[\d.]+", path)]


@pytest.fixture(scope="module")
def context(browser):
    with open_context(browser) as opened:
        yield opened


@pytest.fixture
def opened(context, page):
    context.failures.clear()
    tab = context.new_page()  # which remembers nothing of others
    tab.goto(page.as_uri())
    yield tab
    tab.close()
    assert context.failures == []


@pytest.mark.parametrize("kind", ["light", "dark", "phone"])
def test_the_page_is_readable(browser, page, tmp_path, kind):
    is_phone = kind == "phone"
    with open_context(
        browser, viewport=PHONE if is_phone else DESKTOP, dark=kind == "dark", is_phone=is_phone
    ) as context:
        tab = context.new_page()
        tab.goto(page.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        background = _hex(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert (int(background[1:3], 16) < 64) == (kind == "dark")
        texts = tab.evaluate(TEXT_COLOURS)
        assert len(texts) > 100
        faint = [text for text, colour, back, _ in texts if contrast(_hex(colour), _hex(back)) < 4.5]
        assert faint == []
        pictures = tab.evaluate(IMAGES)
        assert len(pictures) == 2 * 2 * 3 and all(alternative and is_there for alternative, is_there in pictures)
        shot = tab.screenshot(path=str(tmp_path / f"{kind}.png"), full_page=True)
        assert len(shot) > 20_000
        assert context.failures == []


def test_headings_are_in_order_and_pictures_of_numbers_have_words(opened):
    levels = opened.evaluate(HEADINGS)
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    labels = opened.evaluate(
        '() => [...document.querySelectorAll("svg.chart")].map((e) => e.getAttribute("aria-label"))'
    )
    assert len(labels) > 15 and all(re.search(r"\d", label) for label in labels)
    assert opened.title() == "sipo and dpo"


def test_nothing_of_a_prompt_or_a_run_becomes_markup(opened, page):
    assert opened.locator("figcaption", has_text="onerror").first.text_content() == HOSTILE_PROMPT
    assert opened.title() == "sipo and dpo"
    assert opened.evaluate("document.querySelectorAll('script').length") == 2
    assert "<img src=x" not in page.read_text(encoding="utf-8")


def test_the_policy_of_the_page_lets_no_other_script_run(opened):
    opened.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
    opened.wait_for_timeout(50)
    assert opened.title() == "sipo and dpo"
    policy = opened.locator("meta[http-equiv=Content-Security-Policy]").get_attribute("content")
    assert "default-src 'none'" in policy and "unsafe" not in policy
    opened.context.failures.clear()  # the refusal itself


def test_keys_move_the_step_of_the_noise_levels(opened):
    slider = opened.locator("#levels-0")
    card = opened.locator("#levels .card").first
    line, text = card.locator(".plot .series[data-line='0'] .line"), card.locator(".frame-text")
    assert slider.get_attribute("aria-valuetext") == f"step {STEPS}"
    last = line.get_attribute("d"), text.inner_text()
    behind = card.locator(".plot .series[data-line='1'] .line").get_attribute("d")
    slider.focus()
    opened.keyboard.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == "step 4" and text.inner_text().startswith("Step 4:")
    assert line.get_attribute("d") != last[0]
    opened.keyboard.press("Home")
    assert slider.get_attribute("aria-valuetext") == "step 0"
    # The base's curve has stayed where it was.
    assert _places(line.get_attribute("d")) == pytest.approx(_places(behind), abs=0.11)
    assert opened.locator("#levels-1").get_attribute("aria-valuetext") == "step 0"  # the other run goes along
    opened.keyboard.press("End")
    assert (line.get_attribute("d"), text.inner_text()) == last


def test_keys_move_the_samples_and_their_divider(opened):
    panel = opened.locator(".samples").first
    opened.locator("#samples-0").focus()
    assert panel.locator(".shot.now").first.get_attribute("data-step") == str(STEPS)
    opened.keyboard.press("ArrowLeft")
    assert panel.locator(".shot.now").first.get_attribute("data-step") == "4"
    assert panel.locator(".shot:visible").count() == 2 * 2  # of each prompt base and step 4
    handle = panel.get_by_role("slider", name=re.compile("Divider.*red cat"))
    handle.focus()
    strip = panel.locator(".strip").first
    before = strip.screenshot()
    for key in ("PageUp", "ArrowRight", "ArrowLeft", "ArrowLeft"):
        opened.keyboard.press(key)
    assert handle.get_attribute("aria-valuenow") == "68"
    opened.keyboard.press("Home")
    assert handle.get_attribute("aria-valuetext") == "base 0 %, policy 100 %"
    assert strip.screenshot() != before


def test_the_divider_follows_the_pointer_and_gives_way_to_two_columns(opened):
    panel = opened.locator(".samples").first
    handle = panel.locator(".handle").first
    handle.scroll_into_view_if_needed()
    box, frame = handle.bounding_box(), panel.locator(".strip").first.bounding_box()
    opened.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    opened.mouse.down()
    opened.mouse.move(frame["x"] + 0.25 * frame["width"], box["y"] + 5)
    opened.mouse.up()
    assert handle.get_attribute("aria-valuenow") == "25"
    panel.get_by_role("button", name="Side by side").click()
    assert not handle.is_visible()
    base, now = (
        panel.locator(f".strip >> nth=0 >> .shot{kind}").bounding_box() for kind in ("[data-step=base]", ".now")
    )
    assert base["x"] + base["width"] <= now["x"]


def test_charts_answer_keys_pointer_and_legend(opened):
    card = opened.locator(".card", has=opened.get_by_role("heading", name="Margin"))
    plot, tip = card.locator(".plot"), card.locator(".tip")
    plot.focus()
    opened.keyboard.press("Home")
    assert tip.inner_text().startswith("step 0") and "sipo, held out: 0" in tip.inner_text()
    opened.keyboard.press("End")
    assert tip.inner_text().startswith(f"step {STEPS}")
    opened.keyboard.press("Escape")
    assert not tip.is_visible()
    button = card.get_by_role("button", name="sipo, held out")
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert not card.locator(".plot .series[data-line='1']").is_visible()
    plot.hover()
    assert tip.is_visible() and "sipo, held out" not in tip.inner_text() and "dpo, held out" in tip.inner_text()


def test_a_heat_map_is_read_by_keys(opened):
    card = opened.locator(".card", has=opened.get_by_role("heading", name="w by step and noise level")).first
    card.locator(".plot").focus()
    for key in ("ArrowUp", "ArrowUp", "ArrowLeft"):
        opened.keyboard.press(key)
    assert re.match(rf"step {STEPS - 1}, noise level 0\.\d+: ", card.locator(".tip").inner_text())


def test_numbers_open_as_a_table(opened):
    card = opened.locator(".card", has=opened.get_by_role("heading", name="Margin"))
    table = card.locator("table")
    assert not table.is_visible()
    card.locator("summary").focus()
    opened.keyboard.press("Enter")
    assert table.is_visible()
    assert table.locator("tbody tr").count() == STEPS + 1
    header = table.locator("th").all_inner_texts()
    assert header == ["step", "sipo, training", "sipo, held out", "dpo, training", "dpo, held out"]


def test_the_theme_can_be_chosen(opened):
    colours = []
    for name in ("light", "dark", "system"):
        opened.locator("#theme").click()
        assert opened.locator("#theme").inner_text() == f"Theme: {name}"
        colours.append(opened.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours[0] == colours[2] != colours[1]


def test_without_scripts_everything_is_there(browser, page):
    context = browser.new_context(java_script_enabled=False, viewport=DESKTOP)
    tab = context.new_page()
    tab.goto(page.as_uri())
    assert tab.locator("svg.chart").count() > 15
    assert tab.locator(".shot img").count() == 12 and tab.locator(".shot:visible").count() == 12
    assert not tab.locator(".slider").first.is_visible() and not tab.locator("#theme").is_visible()
    tab.locator("summary").first.click()
    assert tab.locator(".card table").first.is_visible()
    context.close()


def test_clips_play_and_can_be_stopped(browser, tmp_path):
    run = write_log(tmp_path / "run", [])
    for place, seed in (("base", 0), ("step-000010", 10)):
        write_clip(run / "samples" / place / "00.webp", seed)
    assert main(["report", str(run), "--output", str(tmp_path / "clips.html")]) == 0
    with open_context(browser) as context:
        tab = context.new_page()
        tab.goto((tmp_path / "clips.html").as_uri())
        image = tab.locator(".shot.now img")
        playing = image.evaluate("(image) => image.currentSrc")
        tab.get_by_role("button", name="Stop clips").click()
        tab.wait_for_function("(was) => document.querySelector('.shot.now img').currentSrc !== was", arg=playing)
        tab.emulate_media(reduced_motion="reduce")
        tab.reload()
        tab.wait_for_function("(was) => document.querySelector('.shot.now img').currentSrc !== was", arg=playing)
        assert context.failures == []
