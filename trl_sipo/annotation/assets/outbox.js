// SPDX-License-Identifier: Apache-2.0
// Answers on their way: in order, each until the server says that it is stored. They outlive a reload of the page, and
// an answer that is sent twice carries the same id, by which the server knows it.

import { Rejected, RetryLater, pause } from "./server.js";

const KEY = "unsent";
const FIRST_WAIT = 0.5; // seconds, doubled with each failure in a row
const LONGEST_WAIT = 8;

export class Outbox {
  #isSending = false;
  #wake = () => {};

  // send: (answer) => promise; events: {changed(), saved(answer), refused(answer), signedOut(), outdated()}.
  constructor(send, storage, events) {
    this.send = send;
    this.storage = storage;
    this.events = events;
    this.unsent = JSON.parse(storage.getItem(KEY) ?? "[]");
    this.hasFailed = false;
    addEventListener("online", () => this.retryNow());
  }

  add(assignment, choice, seconds) {
    this.unsent.push({ assignment, choice, seconds: Math.round(1000 * seconds) / 1000, request_id: randomId() });
    this.#changed();
    this.flush();
  }

  // The choice that is on its way for an assignment, if there is one.
  choiceOf(assignment) {
    return this.unsent.findLast((answer) => answer.assignment === assignment)?.choice;
  }

  // Those of another rater, who used this page before, are not this rater's to send.
  keepOnly(assignments) {
    this.unsent = this.unsent.filter((answer) => assignments.has(answer.assignment));
    this.#changed();
  }

  retryNow() {
    this.#wake();
    this.flush();
  }

  async flush() {
    if (this.#isSending) return;
    this.#isSending = true;
    let wait = FIRST_WAIT;
    while (this.unsent.length && this.#isSending) {
      const answer = this.unsent[0];
      try {
        await this.send(answer);
        this.hasFailed = false;
        wait = FIRST_WAIT;
        this.#drop(answer);
        this.events.saved(answer);
      } catch (error) {
        if (error instanceof Rejected) this.#rejected(answer, error.status);
        else if (!(error instanceof RetryLater)) throw error;
        else {
          this.hasFailed = true;
          this.events.changed();
          await Promise.race([pause(error.seconds ?? wait), new Promise((resolve) => (this.#wake = resolve))]);
          wait = Math.min(2 * wait, LONGEST_WAIT);
        }
      }
    }
    this.#isSending = false;
  }

  #rejected(answer, status) {
    if (status === 401 || status === 403) {
      this.#isSending = false; // until the rater has signed in again, or the page has a new session
      if (status === 401) this.events.signedOut();
      else this.events.outdated();
    } else {
      this.#drop(answer);
      this.events.refused(answer);
    }
  }

  #drop(answer) {
    this.unsent = this.unsent.filter((other) => other !== answer);
    this.#changed();
  }

  #changed() {
    this.storage.setItem(KEY, JSON.stringify(this.unsent));
    this.events.changed();
  }
}

// crypto.randomUUID is for HTTPS and this machine alone.
function randomId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
