// SPDX-License-Identifier: Apache-2.0
// A rater's way through a study: sign in, guidelines, pair after pair, the end.

import { Clock } from "./clock.js";
import { Library, Playback, Zoom, elementsOf, release } from "./media.js";
import { Outbox } from "./outbox.js";
import * as screens from "./screens.js";
import { Rejected, RetryLater, Server, pause } from "./server.js";

const { find } = screens;
const BEGUN = "begun"; // in the tab's storage: the guidelines were read
const SKIP = "skip";
const STAYING = ["pair", "pause", "finished"]; // where a new session of the same rater changes nothing
const LONGEST = 24 * 3600; // seconds that the server takes for an answer
const UNSEEN = 300; // milliseconds in which nobody has looked at a pair: a second press was meant for the one before

const server = new Server();
const clock = new Clock();
const library = new Library(server, () => screens.fillLoading("No connection. Trying again…"));
const zoom = new Zoom(find("arms"), find("zoom-button"));
const outbox = new Outbox((answer) => server.answer(answer), sessionStorage, {
  changed: () => showStatus(),
  saved: (answer) => {
    saved.set(answer.assignment, answer.choice);
    problem = null;
    showStatus();
    if (screens.shownScreen() === "finished") showFinished();
  },
  refused: () => {
    problem = "One answer could not be stored. Its pair is open again.";
    showStatus();
  },
  signedOut: () => askForToken("You were signed out. Sign in again: your last answers are kept until then."),
  outdated: () => pause(2).then(enter),
});

let study = null;
let saved = new Map(); // assignment -> the choice that the server has stored
let problem = ""; // with the last answer; null: it was stored
let position = 0; // of the shown pair among the tasks
let shown = null; // its elements
let playback = null;
let isPlayingAgain = false; // when nothing holds the videos any more
let isTaking = false; // answers, of the shown pair
let unseen = null; // the timer until it does

// ------------------------------------------------------------------------------------------------ coming in

async function start() {
  const token = tokenInAddress();
  if (token) await signIn(token);
  else await enter();
}

// The token is taken out of the address, so that it is neither seen nor kept in the list of pages.
function tokenInAddress() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (token) history.replaceState(null, "", location.pathname);
  return token;
}

async function signIn(token) {
  try {
    await persistently(() => server.signIn(token.trim()));
  } catch (error) {
    if (!(error instanceof Rejected)) throw error;
    askForToken(error.status === 401 ? "This invitation is not known. Is all of it there?" : "This cannot be sent.");
    return;
  }
  sessionStorage.removeItem(BEGUN);
  library.clear();
  await enter();
}

// Read the study, and go to where this rater is; whoever is not signed in is asked to.
async function enter() {
  const before = study?.rater;
  try {
    study = await persistently(() => server.study());
  } catch (error) {
    if (!(error instanceof Rejected)) throw error;
    askForToken("");
    return;
  }
  saved = new Map(Object.entries(study.choices));
  outbox.keepOnly(new Set(study.tasks.map((task) => task.id)));
  outbox.flush();
  screens.fillStudy(study);
  if (study.rater === before && STAYING.includes(screens.shownScreen())) return;
  position = Math.max(0, firstOpen());
  showProgress(null);
  if (sessionStorage.getItem(BEGUN)) goOn();
  else showGuidelines();
}

// Do it, and again for as long as there is no connection.
async function persistently(action) {
  for (let wait = 0.5; ; wait = Math.min(2 * wait, 8)) {
    try {
      return await action();
    } catch (error) {
      if (!(error instanceof RetryLater)) throw error;
      if (!study) screens.show("waiting", false);
      screens.setText("waiting-text", "The server does not answer, or asks to wait. Trying again…");
      await pause(error.seconds ?? wait);
    }
  }
}

function askForToken(problem) {
  leavePair();
  find("help").close();
  screens.show("sign-in", false);
  find("token").value = "";
  find("token").focus();
  screens.setText("sign-in-problem", problem);
}

function showGuidelines() {
  const isNew = saved.size === 0;
  screens.setText("start-button", isNew ? "Start" : firstOpen() < 0 ? "Go on" : `Go on with pair ${position + 1}`);
  screens.show("guidelines");
}

// ------------------------------------------------------------------------------------------------ where one is

const choiceOf = (task) => outbox.choiceOf(task.id) ?? saved.get(task.id);
const decided = (task) => ![undefined, SKIP].includes(choiceOf(task));

// The first pair from there on that has neither been answered nor skipped; else -1.
const freshFrom = (start) => study.tasks.findIndex((task, i) => i >= start && choiceOf(task) === undefined);

// The first of these; else the first that was skipped; else -1.
function firstOpen() {
  const fresh = freshFrom(0);
  return fresh >= 0 ? fresh : study.tasks.findIndex((task) => !decided(task));
}

function goOn() {
  const open = firstOpen();
  if (open < 0) showFinished();
  else showPair(open);
}

function showFinished() {
  leavePair();
  const open = study.tasks.filter((task) => !decided(task)).length;
  screens.fillFinished(study.tasks.length, open);
  showProgress(null);
  showStatus();
  if (outbox.unsent.length) {
    screens.setText("finished-title", "Nearly done");
    screens.setText("finished-text", "Your last answers are being saved. Please keep this page open.");
  }
  screens.show("finished");
}

function showProgress(shownPosition) {
  const done = study.tasks.filter((task) => ![undefined, SKIP].includes(saved.get(task.id))).length;
  screens.fillProgress(done, study.tasks.length, shownPosition);
}

function showStatus() {
  screens.fillStatus(outbox.unsent.length, outbox.hasFailed, problem);
  if (study) showProgress(screens.shownScreen() === "pair" ? position : null);
}

// ------------------------------------------------------------------------------------------------ a pair

async function showPair(number) {
  leavePair();
  position = number;
  const task = study.tasks[number];
  screens.fillTask(task, study.names?.[number]);
  screens.fillChoice(choiceOf(task));
  screens.fillLoading("Loading…");
  find("previous-button").disabled = number === 0;
  find("open-button").hidden = [-1, number].includes(firstOpen());
  screens.show("pair");
  showProgress(number);
  clock.restart();
  takeAnswersSoon();
  try {
    await loadPair(task);
  } catch (error) {
    library.forget(task.id); // what came may be broken
    if (task !== study.tasks[position] || screens.shownScreen() !== "pair") return;
    if (error instanceof Rejected && error.status === 401) askForToken("Please sign in again.");
    else screens.fillLoading("This pair cannot be shown. Try again, or skip it.", true);
  }
}

// Show both samples at once, when both are there; then fetch those of the next pair.
async function loadPair(task) {
  const blobs = await library.pair(task.id);
  const elements = await elementsOf(blobs, task.is_video);
  if (task !== study.tasks[position] || shown || screens.shownScreen() !== "pair") {
    release(elements); // the rater has gone on
    return;
  }
  shown = elements;
  screens.fillArms(elements);
  takeAnswersSoon();
  clock.hold("loading", false);
  if (task.is_video) {
    playback = new Playback(elements, () => screens.fillPlayback(playback));
    screens.fillPlayback(playback);
    isPlayingAgain = !matchMedia("(prefers-reduced-motion: reduce)").matches;
    playOn();
  }
  const next = study.tasks[position + 1];
  if (next) library.pair(next.id).catch(() => {}); // said when it is to be shown
}

// Not at once, so that a double click, or a key that bounces, answers one pair.
function takeAnswersSoon() {
  clearTimeout(unseen);
  setTaking(false);
  unseen = setTimeout(() => setTaking(true), UNSEEN);
}

function setTaking(isOn) {
  isTaking = isOn;
  find("answers").setAttribute("aria-busy", String(!isOn));
}

function leavePair() {
  clock.hold("loading");
  clock.hold("pause", false); // which ends with its pair
  playback?.stop();
  playback = null;
  isPlayingAgain = false;
  screens.fillPlayback(null);
  zoom.set(false);
  screens.fillArms(null);
  if (shown) release(shown);
  shown = null;
}

function answer(choice) {
  if (!isTaking || (choice !== SKIP && !shown) || (choice === "tie" && !study.allows_tie)) return;
  const task = study.tasks[position];
  const before = choiceOf(task);
  outbox.add(task.id, choice, Math.min(clock.seconds(), LONGEST));
  if (before === undefined) showFreshOrEnd(position + 1);
  else if (before === SKIP && choice !== SKIP) goOn();
  else next();
}

function next() {
  if (position + 1 < study.tasks.length) showPair(position + 1);
  else showFreshOrEnd(0);
}

// The next pair from there on that nobody has looked at, or one before; without any, the end.
function showFreshOrEnd(start) {
  const fresh = freshFrom(start) >= 0 ? freshFrom(start) : freshFrom(0);
  if (fresh >= 0) showPair(fresh);
  else showFinished();
}

// Hold time and videos for a reason, or let them go on.
function hold(reason, isHeld) {
  clock.hold(reason, isHeld);
  if (isHeld) {
    isPlayingAgain ||= Boolean(playback?.isPlaying);
    playback?.pause();
  } else playOn();
}

// Start the videos that are to play, unless something holds them.
function playOn() {
  if (!isPlayingAgain || clock.isHeld) return;
  isPlayingAgain = false;
  playback.play();
}

function pausePair(isPaused) {
  hold("pause", isPaused);
  screens.show(isPaused ? "pause" : "pair");
  showStatus();
}

// ------------------------------------------------------------------------------------------------ keys and buttons

const ACTIONS = {
  left: () => answer("left"),
  right: () => answer("right"),
  tie: () => answer("tie"),
  previous: () => position > 0 && showPair(position - 1),
  next: () => (choiceOf(study.tasks[position]) ? next() : answer(SKIP)),
  open: () => !find("open-button").hidden && goOn(),
  zoom: () => shown && zoom.toggle(),
  play: () => playback?.toggle(),
  pause: () => (zoom.isOn ? zoom.set(false) : pausePair(true)),
  help: () => showHelp(),
};

function onKey(event) {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const action = screens.KEYS[key];
  const isTyping = event.target instanceof HTMLInputElement;
  if (!action || isTyping || event.repeat || event.ctrlKey || event.altKey || event.metaKey || find("help").open) return;
  if (key === " " && event.target instanceof HTMLButtonElement) return; // which it presses
  if ([" ", "ArrowDown"].includes(key) && canScroll(event.target)) return; // which it scrolls
  if (screens.shownScreen() === "pair") ACTIONS[action]();
  else if (screens.shownScreen() === "pause" && action === "pause") pausePair(false);
  else if (action === "help" && study && !find("bar").hidden) showHelp();
  else return;
  event.preventDefault();
}

const canScroll = (element) => element === find("prompt") && element.scrollHeight > element.clientHeight;

function showHelp() {
  hold("help", true);
  find("help").showModal();
}

async function signOut() {
  if (outbox.unsent.length && !window.confirm("Some answers are not saved yet, and would be lost. Sign out?")) return;
  find("help").close();
  try {
    await persistently(async () => {
      await server.study(); // for its token: another tab may have signed in anew
      await server.signOut();
    });
  } catch (error) {
    if (!(error instanceof Rejected) || error.status !== 401) throw error; // nobody is signed in any more
  }
  outbox.keepOnly(new Set());
  sessionStorage.clear();
  location.reload();
}

// What the rater has answered elsewhere meanwhile.
async function readChoices() {
  const before = [...saved];
  const choices = await persistently(() => server.choices());
  if (String(before) !== String([...saved])) return; // an answer has overtaken the list
  saved = new Map(Object.entries(choices));
  showStatus();
}

const CLICKS = {
  "start-button": () => (sessionStorage.setItem(BEGUN, "yes"), goOn()),
  "choose-left": ACTIONS.left,
  "choose-tie": ACTIONS.tie,
  "choose-right": ACTIONS.right,
  "previous-button": ACTIONS.previous,
  "next-button": ACTIONS.next,
  "open-button": ACTIONS.open,
  "play-button": ACTIONS.play,
  "pause-button": ACTIONS.pause,
  "resume-button": () => pausePair(false),
  "retry-button": () => showPair(position),
  "skipped-button": goOn,
  "review-button": () => showPair(0),
  "help-button": showHelp,
  "close-help": () => find("help").close(),
  "sign-out": signOut,
};

for (const [id, action] of Object.entries(CLICKS)) find(id).addEventListener("click", () => action());
find("help").addEventListener("close", () => hold("help", false));
find("sign-in-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = find("token").value.trim();
  signIn(given.includes("#token=") ? given.split("#token=")[1] : given);
});
addEventListener("keydown", onKey);
addEventListener("hashchange", () => {
  const token = tokenInAddress();
  if (token) signIn(token);
});
addEventListener("beforeunload", (event) => outbox.unsent.length && event.preventDefault());

// Out of sight nobody looks. Back again, the rater may have gone on elsewhere.
document.addEventListener("visibilitychange", () => {
  hold("hidden", document.hidden);
  if (document.hidden || !study || screens.shownScreen() === "sign-in") return;
  outbox.retryNow();
  readChoices().catch((error) => {
    if (!(error instanceof Rejected)) throw error;
    askForToken("Please sign in again.");
  });
});

clock.hold("hidden", document.hidden);
start();
