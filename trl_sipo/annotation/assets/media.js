// SPDX-License-Identifier: Apache-2.0
// The two samples of a pair: fetched whole before either is shown, videos started, looped and kept together.

import { RetryLater, pause } from "./server.js";

const KEPT = 4; // pairs in memory
const LONGEST_WAIT = 8; // seconds
const OUT_OF_STEP = 0.08; // seconds that one video may be ahead of the other
const LOOK_EVERY = 200; // milliseconds
const ZOOM = 3;

// Fetches pairs, and keeps the last few.
export class Library {
  #pairs = new Map();

  constructor(server, onTrouble) {
    this.server = server;
    this.onTrouble = onTrouble;
  }

  // Two blobs; asked for again for as long as there is no connection.
  pair(assignment) {
    const known = this.#pairs.get(assignment);
    this.#pairs.delete(assignment);
    const fetched = known ?? Promise.all([this.#sample(assignment, "left"), this.#sample(assignment, "right")]);
    this.#pairs.set(assignment, fetched);
    fetched.catch(() => this.#pairs.delete(assignment));
    if (this.#pairs.size > KEPT) this.#pairs.delete(this.#pairs.keys().next().value);
    return fetched;
  }

  forget(assignment) {
    this.#pairs.delete(assignment);
  }

  clear() {
    this.#pairs.clear();
  }

  async #sample(assignment, side) {
    for (let wait = 0.5; ; wait = Math.min(2 * wait, LONGEST_WAIT)) {
      try {
        return await this.server.sample(assignment, side);
      } catch (error) {
        if (!(error instanceof RetryLater)) throw error;
        this.onTrouble();
        await pause(error.seconds ?? wait);
      }
    }
  }
}

// Elements of both samples, decoded and ready to be shown. An unreadable file is an error.
export function elementsOf(blobs, isVideo) {
  return Promise.all(blobs.map((blob, side) => (isVideo ? videoOf(blob, side) : imageOf(blob, side))));
}

// Let go of what elements hold. A browser has a number of players, and a video keeps its one until it is collected.
export function release(elements) {
  for (const element of elements) {
    URL.revokeObjectURL(element.src);
    if (!(element instanceof HTMLVideoElement)) continue;
    element.removeAttribute("src");
    element.load();
  }
}

async function imageOf(blob, side) {
  const image = new Image();
  image.alt = `Result ${"AB"[side]}`;
  image.draggable = false;
  image.src = URL.createObjectURL(new Blob([blob], { type: "image/png" }));
  await image.decode();
  return image;
}

function videoOf(blob, side) {
  const video = document.createElement("video");
  Object.assign(video, { muted: true, playsInline: true, preload: "auto", disablePictureInPicture: true });
  video.setAttribute("aria-label", `Video ${"AB"[side]}`);
  return new Promise((resolve, reject) => {
    video.oncanplaythrough = () => resolve(video);
    video.onerror = () => reject(new Error("The video cannot be played."));
    video.src = URL.createObjectURL(new Blob([blob], { type: "video/mp4" }));
  });
}

// Plays two videos as one: both start together, both begin anew when both have ended.
export class Playback {
  isPlaying = false;

  constructor(videos, onChange) {
    this.videos = videos;
    this.onChange = onChange;
    for (const video of videos) video.onended = () => this.#loop();
    this.timer = setInterval(() => this.#keepTogether(), LOOK_EVERY);
  }

  play() {
    this.isPlaying = true;
    this.#keepTogether();
    for (const video of this.videos) {
      // A browser that does not let videos start by themselves leaves that to the button. A start that was broken off
      // (AbortError) was so by a pause, which a later start may have ended.
      if (!video.ended) video.play().catch((error) => error.name !== "AbortError" && this.pause());
    }
    this.onChange();
  }

  pause() {
    this.isPlaying = false;
    for (const video of this.videos) video.pause();
    this.onChange();
  }

  toggle() {
    if (this.isPlaying) this.pause();
    else this.play();
  }

  stop() {
    clearInterval(this.timer);
    for (const video of this.videos) video.onended = null;
    this.pause();
  }

  #loop() {
    if (!this.isPlaying || !this.videos.every((video) => video.ended)) return;
    for (const video of this.videos) video.currentTime = 0;
    this.play();
  }

  #keepTogether() {
    const [first, second] = this.videos;
    if (first.seeking || second.seeking || first.ended || second.ended) return;
    if (Math.abs(first.currentTime - second.currentTime) > OUT_OF_STEP) second.currentTime = first.currentTime;
  }
}

// Shows both samples larger, at the same place of both, which follows the pointer.
export class Zoom {
  isOn = false;

  constructor(arms, button) {
    this.arms = arms;
    this.button = button;
    for (const frame of arms.querySelectorAll(".frame")) {
      frame.addEventListener("click", (event) => this.toggle(event));
      frame.addEventListener("pointermove", (event) => this.isOn && this.#follow(event));
    }
    button.addEventListener("click", () => this.toggle());
    arms.style.setProperty("--zoom", ZOOM);
  }

  toggle(event) {
    this.set(!this.isOn);
    if (this.isOn) this.#follow(event);
  }

  set(isOn) {
    this.isOn = isOn;
    this.arms.classList.toggle("zoomed", isOn);
    this.button.setAttribute("aria-pressed", String(isOn));
  }

  #follow(event) {
    let [x, y] = [0.5, 0.5];
    if (event) {
      const box = event.currentTarget.getBoundingClientRect();
      x = (event.clientX - box.left) / box.width;
      y = (event.clientY - box.top) / box.height;
    }
    this.arms.style.setProperty("--x", `${100 * Math.min(1, Math.max(0, x))}%`);
    this.arms.style.setProperty("--y", `${100 * Math.min(1, Math.max(0, y))}%`);
  }
}
