// SPDX-License-Identifier: Apache-2.0
// Requests to the server. What fails is one of two errors: try again later, or do not.

const SECONDS_TO_WAIT = 15;

export class RetryLater extends Error {
  constructor(message, seconds) {
    super(message);
    this.seconds = seconds; // that the server asked for; undefined: as you like
  }
}

export class Rejected extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export class Server {
  csrfToken = "";

  async study() {
    const study = await this.#json("/api/study", {});
    this.csrfToken = study.csrf_token;
    return study;
  }

  async choices() {
    return (await this.#json("/api/choices", {})).choices;
  }

  signIn(token) {
    return this.#post("/api/sign-in", { token });
  }

  signOut() {
    return this.#post("/api/sign-out", {});
  }

  answer(answer) {
    // The browser sends it to its end even if the page is closed meanwhile.
    return this.#post("/api/answer", answer, { keepalive: true });
  }

  async sample(assignment, side) {
    const response = await this.#fetch(`/media/${assignment}/${side}`, { seconds: 120 });
    return this.#read(() => response.blob());
  }

  #post(path, value, options = {}) {
    const headers = { "Content-Type": "application/json", "X-CSRF-Token": this.csrfToken };
    return this.#json(path, { method: "POST", headers, body: JSON.stringify(value), ...options });
  }

  async #json(path, options) {
    const response = await this.#fetch(path, options);
    return this.#read(() => response.json());
  }

  async #fetch(path, { seconds = SECONDS_TO_WAIT, ...options }) {
    const signal = AbortSignal.timeout(1000 * seconds);
    const response = await this.#read(() => fetch(path, { ...options, signal, credentials: "same-origin" }));
    if (response.ok) return response;
    if (response.status === 429 || response.status >= 500) {
      throw new RetryLater(`status ${response.status}`, Number(response.headers.get("Retry-After")) || undefined);
    }
    throw new Rejected(`status ${response.status}`, response.status);
  }

  // A connection may break before the answer, or in the middle of it.
  async #read(action) {
    try {
      return await action();
    } catch (error) {
      throw new RetryLater(`no connection: ${error.message}`);
    }
  }
}

export const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
