// SPDX-License-Identifier: Apache-2.0
// What is on the page. All that comes from a study is put there as text, never as markup.

const SCREENS = ["waiting", "sign-in", "guidelines", "pair", "pause", "finished"];
const SIDES = ["left", "right"];
export const CHOICES = ["left", "tie", "right"];

// Keys, and what they do; the first ones are on the buttons.
export const KEYS = {
  ArrowLeft: "left", a: "left", 1: "left",
  ArrowRight: "right", b: "right", 2: "right",
  ArrowDown: "tie", t: "tie", 0: "tie",
  Backspace: "previous", p: "previous",
  n: "next", g: "open", z: "zoom", " ": "play", Escape: "pause", "?": "help",
}; // prettier-ignore

const EXPLAINED = [
  ["left", "← A 1", "A is better"],
  ["right", "→ B 2", "B is better"],
  ["tie", "↓ T 0", "tie: neither is better"],
  ["previous", "P ⌫", "previous pair"],
  ["next", "N", "skip, or next pair"],
  ["open", "G", "next open pair"],
  ["zoom", "Z", "zoom into both, or click into one"],
  ["play", "Space", "stop and start the videos"],
  ["pause", "Esc", "pause, and go on"],
  ["help", "?", "help"],
];

export const find = (id) => document.getElementById(id);

// Show one part of the page, and go to its heading, where keys and screen readers go on.
export function show(name, focus = true) {
  const before = shownScreen();
  for (const screen of SCREENS) find(screen).hidden = screen !== name;
  find("bar").hidden = ["waiting", "sign-in"].includes(name);
  find("pause-button").hidden = name !== "pair";
  if (name !== before) scrollTo(0, 0);
  if (!focus) return;
  const heading = find(name).querySelector("[tabindex='-1']");
  heading.blur(); // a screen reader says again what gets the focus again
  heading.focus({ preventScroll: true });
}

export function shownScreen() {
  return SCREENS.find((screen) => !find(screen).hidden);
}

export function setText(id, text) {
  if (find(id).textContent !== text) find(id).textContent = text;
}

// A line break begins a paragraph; lines that begin with "- " are a list.
export function fillText(element, text) {
  element.replaceChildren();
  for (const line of text.split("\n").map((part) => part.trim())) {
    if (line.startsWith("- ")) {
      if (element.lastElementChild?.tagName !== "UL") element.append(document.createElement("ul"));
      element.lastElementChild.append(elementWith("li", line.slice(2)));
    } else if (line) element.append(elementWith("p", line));
  }
}

function elementWith(tag, text) {
  const element = document.createElement(tag);
  element.textContent = text;
  return element;
}

// What all pairs of a study share.
export function fillStudy(study) {
  document.title = study.title;
  setText("title", study.title);
  setText("guidelines-title", study.title);
  setText("question", study.question);
  setText("signed-in-as", `Signed in as ${study.rater}.`);
  for (const id of ["guidelines-text", "help-guidelines"]) fillText(find(id), study.guidelines);
  const hasVideos = study.tasks.some((task) => task.is_video);
  const used = EXPLAINED.filter(([what]) => (what !== "tie" || study.allows_tie) && (what !== "play" || hasVideos));
  for (const id of ["guidelines-keys", "help-keys"]) {
    const shown = id === "help-keys" ? used : used.filter(([what]) => CHOICES.includes(what));
    find(id).replaceChildren(...shown.flatMap(([, keys, text]) => [keysElement(keys), elementWith("dd", text)]));
  }
  find("choose-tie").hidden = !study.allows_tie;
}

function keysElement(keys) {
  const term = document.createElement("dt");
  term.append(...keys.split(" ").map((key) => elementWith("kbd", key)));
  return term;
}

// The texts around a pair. names: of left and right, or nothing.
export function fillTask(task, names) {
  setText("prompt", task.prompt);
  find("prompt").scrollTop = 0;
  setText("category", task.category);
  find("category").hidden = !task.category;
  SIDES.forEach((side, number) => {
    find(side).querySelector(".name").textContent = names?.[number] ?? "";
  });
}

export function fillChoice(choice) {
  for (const name of CHOICES) {
    find(`choose-${name}`).setAttribute("aria-pressed", String(name === choice));
    find(name)?.classList.toggle("chosen", name === choice);
  }
  const button = find("next-button");
  button.replaceChildren(choice ? "Next" : "Skip", elementWith("kbd", "N"));
}

export function fillProgress(done, total, position) {
  find("progress-bar").max = Math.max(1, total);
  find("progress-bar").value = done;
  setText("progress-text", `${done} of ${total} answered`);
  setText("position-text", position === null ? "" : `· pair ${position + 1}`);
}

// elements: the samples of left and right; null while they are on their way.
export function fillArms(elements) {
  find("arms").setAttribute("aria-busy", String(!elements));
  find("loading").hidden = Boolean(elements);
  SIDES.forEach((side, number) => {
    find(side).querySelector(".frame").replaceChildren(...(elements ? [elements[number]] : []));
  });
  for (const name of CHOICES) find(`choose-${name}`).disabled = !elements;
  find("zoom-button").disabled = !elements;
}

export function fillLoading(text, canRetry = false) {
  setText("loading-text", text);
  find("retry-button").hidden = !canRetry;
}

export function fillPlayback(playback) {
  const button = find("play-button");
  button.hidden = !playback;
  if (playback) button.replaceChildren(playback.isPlaying ? "Stop" : "Play", elementWith("kbd", "Space"));
}

export function fillFinished(total, skipped) {
  setText("finished-title", skipped ? "Nearly done" : "All done");
  setText(
    "finished-text",
    skipped
      ? `${total - skipped} of ${total} pairs are answered, and ${skipped} skipped.`
      : `All ${total} answers are saved. Thank you! You can close this page.`,
  );
  find("skipped-button").hidden = !skipped;
  setText("skipped-button", `Answer the skipped ${skipped === 1 ? "pair" : "pairs"}`);
}

// problem: with the last answer; "": there was none; null: it is stored.
export function fillStatus(unsent, hasFailed, problem) {
  const count = unsent === 1 ? "1 answer is" : `${unsent} answers are`;
  const state = problem ? "waiting" : !unsent && problem === null ? "saved" : hasFailed && unsent ? "waiting" : "";
  const sending = hasFailed ? `${count} not saved yet. Trying again…` : "Saving…";
  setText("status", problem || (unsent ? sending : state && "Saved"));
  find("status").className = state;
}
