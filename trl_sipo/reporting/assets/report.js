// SPDX-License-Identifier: Apache-2.0
// Makes the charts and pictures of a report answer: legends, read-outs, sliders, the divider. Without it all is there,
// and still. What was set is kept for as long as the window is open, so that a page that looks again shows the same.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const plot = data.plot;
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const short = (value) => (value === null || value === undefined ? "-" : String(Number(value.toPrecision(4))));
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

  // ---------------------------------------------------------------------------------------------- what was set
  const name = "trl-sipo report " + location.pathname;
  let kept = {};
  let canKeep = true;
  try {
    kept = JSON.parse(sessionStorage.getItem(name) || "{}");
  } catch (error) {
    canKeep = false; // a browser that keeps nothing of a file: the page then begins anew each time
  }
  const keep = (key, value) => {
    kept[key] = value;
    if (canKeep) sessionStorage.setItem(name, JSON.stringify(kept));
  };

  // ---------------------------------------------------------------------------------------------- light and dark
  const theme = document.getElementById("theme");
  const themes = ["system", "light", "dark"];
  const useTheme = (value) => {
    if (value === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = value;
    theme.textContent = "Theme: " + value;
    keep("theme", value);
  };
  theme.hidden = false;
  theme.addEventListener("click", () => useTheme(themes[(themes.indexOf(kept.theme) + 1) % 3]));
  useTheme(themes.includes(kept.theme) ? kept.theme : "system");

  // ---------------------------------------------------------------------------------------------- charts
  const svg = (tag, attributes, parent) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent.append(element);
    return element;
  };
  const base = plot.height - plot.bottom;
  const right = plot.width - plot.right;
  const placeX = (chart, value) =>
    plot.left + ((value - chart.x[0]) / (chart.x[1] - chart.x[0])) * (right - plot.left);
  const placeY = (chart, value) => {
    const scale = chart.log ? Math.log10 : (number) => number;
    const [low, high] = chart.y.map(scale);
    return base - ((scale(value) - low) / (high - low)) * (base - plot.top);
  };
  const nearest = (values, value) => {
    let best = 0;
    values.forEach((other, index) => {
      if (Math.abs(other - value) < Math.abs(values[best] - value)) best = index;
    });
    return best;
  };

  // A cursor that goes along what a chart can be asked for: by pointer or by keys.
  const addReadout = (card, places, show, move) => {
    const box = card.querySelector(".plot");
    const picture = box.querySelector("svg");
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.setAttribute("role", "status");
    tip.hidden = true;
    box.append(tip);
    box.tabIndex = 0;
    box.id = card.id + "-plot";
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", "Values of " + card.querySelector("h3").textContent + ": arrow keys read them");
    const mark = svg("g", { class: "cursor" }, picture);
    let at = null;
    const go = (next) => {
      at = next;
      const [lines, x] = show(at, mark);
      tip.replaceChildren(
        ...lines.map((line) => {
          const row = document.createElement("div");
          row.textContent = line;
          return row;
        }),
      );
      tip.className = "tip " + (x > plot.width / 2 ? "left" : "right");
      tip.hidden = false;
    };
    const stop = () => {
      at = null;
      tip.hidden = true;
      mark.replaceChildren();
    };
    const byPointer = (event) => {
      const frame = picture.getBoundingClientRect();
      const unit = plot.width / frame.width;
      go(places((event.clientX - frame.left) * unit, (event.clientY - frame.top) * unit));
    };
    box.addEventListener("pointermove", byPointer);
    box.addEventListener("pointerdown", byPointer);
    box.addEventListener("pointerleave", stop);
    box.addEventListener("blur", stop);
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return stop();
      const next = move(at, event.key);
      if (next !== null) {
        event.preventDefault();
        go(next);
      }
    });
    return () => at !== null && go(at);
  };

  const isOff = (card, index) => card.querySelector(`.series[data-line="${index}"]`).classList.contains("off");
  const addLegend = (card, chart) => {
    // By name: lines may come before others when the page looks again.
    const off = new Set((kept.off || {})[card.id] || []);
    for (const button of all(".legend button", card)) {
      const index = Number(button.dataset.line);
      const label = chart.lines[index].label;
      button.id = `${card.id}-line-${encodeURIComponent(label)}`;
      const line = card.querySelector(`.plot .series[data-line="${index}"]`);
      const use = () => {
        line.classList.toggle("off", off.has(label));
        button.setAttribute("aria-pressed", String(!off.has(label)));
      };
      button.disabled = chart.lines.length < 2;
      button.addEventListener("click", () => {
        if (!off.delete(label)) off.add(label);
        use();
        keep("off", { ...kept.off, [card.id]: [...off] });
      });
      use();
    }
  };

  const addLines = (card, chart) => {
    const steps = [...new Set(chart.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    if (!steps.length) return () => {};
    const show = (index, mark) => {
      const step = steps[index];
      const x = placeX(chart, step);
      mark.replaceChildren();
      svg("line", { x1: x, x2: x, y1: plot.top, y2: base }, mark);
      const lines = [`${chart.xLabel} ${short(step)}`];
      chart.lines.forEach((line, number) => {
        if (isOff(card, number) || !line.x.length) return;
        const place = nearest(line.x, step);
        const value = line.y[place];
        const away = line.x[place] === step ? "" : ` (${chart.xLabel} ${short(line.x[place])})`;
        const spread = line.low && line.low[place] !== line.high[place] && value !== null;
        const range = spread ? ` [${short(line.low[place])}, ${short(line.high[place])}]` : "";
        const none = chart.frames ? "-" : "not finite"; // of a noise level without a pair there is no number
        lines.push(`${line.label}: ${value === null ? none : short(value)}${range}${away}`);
        if (value !== null) svg("circle", { cx: placeX(chart, line.x[place]), cy: placeY(chart, value), r: 3.2 }, mark);
      });
      return [lines, x];
    };
    const places = (x) => nearest(steps.map((step) => placeX(chart, step)), x);
    const last = steps.length - 1;
    const move = (at, key) => {
      const from = at === null ? (key === "ArrowLeft" ? last + 1 : -1) : at;
      const to = { ArrowRight: from + 1, ArrowLeft: from - 1, Home: 0, End: last }[key];
      return to === undefined ? null : clamp(to, 0, last);
    };
    return addReadout(card, places, show, move);
  };

  const addMap = (card, heat) => {
    const picture = card.querySelector("svg");
    const column = picture.querySelector(".column");
    const width = Number(column.getAttribute("width"));
    const height = (base - plot.top) / heat.times.length;
    const show = ([step, time], mark) => {
      mark.replaceChildren();
      const x = plot.left + step * width;
      const frame = { class: "cell", x, y: base - (time + 1) * height, width, height };
      svg("rect", frame, mark);
      const value = heat.cells[step][time];
      return [[`step ${heat.steps[step]}, noise level ${short(heat.times[time])}: ${short(value)}`], x];
    };
    const places = (x, y) => [
      clamp(Math.floor((x - plot.left) / width), 0, heat.steps.length - 1),
      clamp(Math.floor((base - y) / height), 0, heat.times.length - 1),
    ];
    const moves = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    const move = (at, key) => {
      if (!moves[key]) return null;
      if (at === null) return [heat.steps.length - 1, 0];
      const [step, time] = [at[0] + moves[key][0], at[1] + moves[key][1]];
      return [clamp(step, 0, heat.steps.length - 1), clamp(time, 0, heat.times.length - 1)];
    };
    addReadout(card, places, show, move);
    return (step) => column.setAttribute("x", plot.left + nearest(heat.steps, step) * width);
  };

  // Draws the lines of one frame in the place of the last one's.
  const drawFrame = (card, chart, index) => {
    chart.frames[index].forEach((values, number) => {
      chart.lines[number].y = values;
      const group = card.querySelector(`.plot .series[data-line="${number}"]`);
      let path = "";
      let marks = "";
      let isDown = false;
      const mark = group.querySelector(".mark");
      const shape = mark && (mark.dataset.shape ||= mark.getAttribute("d").match(/^M[-\d.]+ [-\d.]+([^M]*)/)?.[1] || "");
      values.forEach((value, place) => {
        if (value === null) {
          isDown = false;
          return;
        }
        const spot = `${placeX(chart, chart.lines[number].x[place]).toFixed(1)} ${placeY(chart, value).toFixed(1)}`;
        path += (isDown ? "L" : "M") + spot;
        marks += `M${spot}${shape || ""}`;
        isDown = true;
      });
      group.querySelector(".line").setAttribute("d", path);
      if (mark) mark.setAttribute("d", marks);
    });
    card.querySelector(".frame-text").textContent = chart.texts[index];
  };

  const followers = {}; // slider -> what goes along with it
  const follow = (group, action) => (followers[group] ||= []).push(action);
  for (const [id, chart] of Object.entries(data.charts)) {
    const card = document.getElementById(id);
    if (chart.heat) {
      const mark = addMap(card, chart.heat);
      follow(chart.group, (index, step) => mark(step));
      continue;
    }
    addLegend(card, chart);
    const again = addLines(card, chart);
    if (chart.frames) {
      follow(chart.group, (index) => {
        drawFrame(card, chart, index);
        again();
      });
    }
  }

  // ---------------------------------------------------------------------------------------------- sliders
  const sliders = all(".slider input");
  const kindOf = (slider) => slider.id.replace(/-\d+$/, "");
  const stepsOf = (slider) => slider.dataset.steps.split(" ").map(Number);
  const setSlider = (slider, index) => {
    const steps = stepsOf(slider);
    slider.value = index;
    slider.setAttribute("aria-valuetext", "step " + steps[index]);
    slider.parentElement.querySelector("output").textContent = steps[index];
    for (const action of followers[slider.id] || []) action(index, steps[index]);
    // "last" goes on being the last when the page looks again.
    keep("sliders", { ...kept.sliders, [slider.id]: index === steps.length - 1 ? "last" : steps[index] });
  };

  // ---------------------------------------------------------------------------------------------- samples
  const setCut = (strip, percent) => {
    const handle = strip.querySelector(".handle");
    strip.style.setProperty("--cut", percent + "%");
    handle.setAttribute("aria-valuenow", String(Math.round(percent)));
    handle.setAttribute("aria-valuetext", `base ${Math.round(percent)} %, policy ${Math.round(100 - percent)} %`);
    keep("cuts", { ...kept.cuts, [strip.parentElement.id]: percent });
  };
  const addHandle = (strip) => {
    const handle = document.createElement("div");
    handle.className = "handle";
    handle.tabIndex = 0;
    handle.id = strip.parentElement.id + "-divider";
    const facts = { role: "slider", "aria-orientation": "horizontal", "aria-valuemin": 0, "aria-valuemax": 100 };
    for (const [key, value] of Object.entries(facts)) handle.setAttribute(key, value);
    const prompt = strip.parentElement.querySelector("figcaption").textContent;
    handle.setAttribute("aria-label", "Divider between base and policy: " + prompt);
    strip.append(handle);
    strip.removeAttribute("tabindex");
    const byPointer = (event) => {
      const frame = strip.getBoundingClientRect();
      setCut(strip, clamp((100 * (event.clientX - frame.left)) / frame.width, 0, 100));
    };
    handle.addEventListener("pointerdown", (event) => {
      handle.setPointerCapture(event.pointerId);
      handle.addEventListener("pointermove", byPointer);
    });
    for (const end of ["pointerup", "pointercancel"])
      handle.addEventListener(end, () => handle.removeEventListener("pointermove", byPointer));
    handle.addEventListener("keydown", (event) => {
      const now = Number(handle.getAttribute("aria-valuenow"));
      const by = { ArrowLeft: -2, ArrowDown: -2, ArrowRight: 2, ArrowUp: 2, PageDown: -20, PageUp: 20 }[event.key];
      const to = { Home: 0, End: 100 }[event.key] ?? (by === undefined ? undefined : now + by);
      if (to === undefined) return;
      event.preventDefault();
      setCut(strip, clamp(to, 0, 100));
    });
    setCut(strip, (kept.cuts || {})[strip.parentElement.id] ?? 50);
    const fit = () => {
      const picture = strip.querySelector('.shot[data-step="base"] picture') || strip;
      handle.style.height = picture.getBoundingClientRect().height + "px";
    };
    new ResizeObserver(fit).observe(strip);
    return fit;
  };
  for (const panel of all(".samples")) {
    const group = panel.dataset.group;
    const mode = panel.querySelector(".mode");
    const strips = all(".strip", panel).filter((strip) => strip.querySelector('[data-step="base"]'));
    const fits = strips.map(addHandle);
    const useMode = (isSide) => {
      panel.classList.toggle("compare", !isSide);
      for (const handle of all(".handle", panel)) handle.hidden = isSide;
      mode.setAttribute("aria-pressed", String(isSide));
      keep("modes", { ...kept.modes, [group]: isSide });
      fits.forEach((fit) => fit());
    };
    panel.classList.add("live");
    mode.id = group + "-mode";
    mode.hidden = !strips.length;
    mode.addEventListener("click", () => useMode(panel.classList.contains("compare")));
    follow(group, (index, step) => {
      for (const shot of all(".shot", panel)) shot.classList.toggle("now", shot.dataset.step === String(step));
      fits.forEach((fit) => fit());
    });
    useMode(Boolean((kept.modes || {})[group]));
    const stop = panel.querySelector(".stop");
    if (stop) {
      const useStop = (isStopped) => {
        stop.setAttribute("aria-pressed", String(isStopped));
        for (const source of all("source", panel))
          source.media = isStopped ? "all" : "(prefers-reduced-motion: reduce)";
        keep("stopped", { ...kept.stopped, [group]: isStopped });
      };
      stop.hidden = false;
      stop.id = group + "-stop";
      stop.addEventListener("click", () => useStop(stop.getAttribute("aria-pressed") !== "true"));
      useStop(Boolean((kept.stopped || {})[group]));
    }
  }

  for (const slider of sliders) {
    slider.parentElement.hidden = "single" in slider.parentElement.dataset;
    const steps = stepsOf(slider);
    const was = (kept.sliders || {})[slider.id];
    setSlider(slider, typeof was === "number" ? nearest(steps, was) : steps.length - 1);
    slider.addEventListener("input", () => {
      const index = Number(slider.value);
      setSlider(slider, index);
      // Sliders of the same kind, of other runs, go along.
      for (const other of sliders)
        if (other !== slider && kindOf(other) === kindOf(slider))
          setSlider(other, nearest(stepsOf(other), steps[index]));
    });
  }

  // ---------------------------------------------------------------------------------------------- looking again
  for (const details of all("details")) {
    details.open = (kept.open || []).includes(details.id);
    details.querySelector("summary").id = details.id + "-summary";
    details.addEventListener("toggle", () =>
      keep("open", all("details[open]").map((one) => one.id)),
    );
  }
  if (!data.reload) return;
  const pause = document.getElementById("pause");
  let isPaused = Boolean(kept.paused);
  let isHeld = false; // by a pointer that is down
  let isLeaving = false; // asked to load again, which takes its time
  const usePause = () => {
    pause.setAttribute("aria-pressed", String(isPaused));
    keep("paused", isPaused);
  };
  pause.hidden = false;
  pause.addEventListener("click", () => {
    isPaused = !isPaused;
    usePause();
    if (isPaused && isLeaving) stop(); // else the page changes under the hands of one who asked it not to
    isLeaving = false;
  });
  usePause();
  addEventListener("pointerdown", () => (isHeld = true));
  for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => (isHeld = false));
  // One that was let go outside of the window, or in a menu, is up when it moves again.
  addEventListener("pointermove", (event) => (isHeld = isHeld && event.buttons !== 0));
  setInterval(() => {
    if (isPaused || isHeld || document.hidden) return;
    isLeaving = true;
    keep("scroll", [scrollX, scrollY]);
    keep("focus", document.activeElement?.id || null);
    location.reload();
  }, 1000 * data.reload);
  if (kept.scroll) {
    history.scrollRestoration = "manual";
    scrollTo(...kept.scroll);
    keep("scroll", null);
    if (kept.focus) document.getElementById(kept.focus)?.focus({ preventScroll: true });
  }
})();
