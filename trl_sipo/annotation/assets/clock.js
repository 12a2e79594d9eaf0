// SPDX-License-Identifier: Apache-2.0
// The time that was spent on a pair: it stands still while anything holds it, such as a pause or a hidden page.

export class Clock {
  #holds = new Set();
  #spent = 0;
  #since = null;

  constructor(now = () => performance.now()) {
    this.now = now;
  }

  restart() {
    this.#spent = 0;
    this.#since = this.#holds.size ? null : this.now();
  }

  hold(reason, isHeld = true) {
    this.#spent = this.#total();
    if (isHeld) this.#holds.add(reason);
    else this.#holds.delete(reason);
    this.#since = this.#holds.size ? null : this.now();
  }

  get isHeld() {
    return this.#holds.size > 0;
  }

  seconds() {
    return this.#total() / 1000;
  }

  #total() {
    return this.#spent + (this.#since === null ? 0 : this.now() - this.#since);
  }
}
