const HEIGHT = 250, PAD = {left: 58, right: 10, top: 8, bottom: 38};
const log = document.getElementById("log");
const isNumber = value => typeof value === "number"; // others are names, as "NaN"

function text(value) {
  if (!isNumber(value)) return value;
  if (value && Math.abs(value) < 1e-4) return String(Number(value.toPrecision(5)).toExponential());
  return value.toLocaleString("en", {maximumSignificantDigits: 5});
}

/* Returns about `count` round numbers between two. */
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find(factor => factor * power >= 0.999 * raw);
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  return Array.from({length: last - first + 1}, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/* Returns round numbers between two for a logarithmic axis. */
function logTicks(low, high) {
  const decades = Math.log10(high / low), every = Math.ceil(decades / 6);
  if (decades < 1) return ticks(low, high, 5);
  const powers = Array.from({length: Math.ceil(decades) + 2}, (_, i) => Math.floor(Math.log10(low)) + i);
  return powers.filter(power => power % every === 0)
    .flatMap(power => (decades < 3 ? [1, 2, 5] : [1]).map(factor => Number(`${factor}e${power}`)))
    .filter(value => value >= low && value <= high);
}

class Chart {
  constructor(plot, figure) {
    this.plot = plot;
    this.figure = figure;
    this.values = plot.parentNode.querySelectorAll(".legend strong");
    this.steps = [...new Set(figure.lines.flatMap(line => line.x))].sort((a, b) => a - b);
    plot.innerHTML = '<svg aria-hidden="true"><g></g><rect class="selected"></rect><path class="cursor"></path></svg>';
    [this.drawing, this.selected, this.cursor] = plot.firstChild.children;
    plot.addEventListener("pointermove", event => this.point(event));
    plot.addEventListener("pointerdown", event => this.press(event));
    plot.addEventListener("pointerup", event => this.release(event));
    plot.addEventListener("pointerleave", () => this.show(null));
    plot.addEventListener("blur", () => this.show(null));
    plot.addEventListener("dblclick", () => this.toggle());
    plot.addEventListener("keydown", event => this.key(event));
    this.reset();
    new ResizeObserver(() => this.draw()).observe(plot);
  }

  reset() {
    const end = Math.max(1, this.figure.end);
    this.range = [-0.02 * end, 1.02 * end];
    this.isZoomed = this.showsAll = false;
  }

  toggle() {
    const showsAll = !this.isZoomed && !this.showsAll;
    this.reset();
    this.showsAll = showsAll;
    this.draw();
  }

  /* Returns whether the y axis is logarithmic, and its ends, as logarithms if it is. */
  axis() {
    const {lines, positive, view} = this.figure, [left, right] = this.range;
    const isLog = log.checked && positive;
    if (view && !isLog && !this.isZoomed && !this.showsAll) return [false, ...view];
    let low = Infinity, high = -Infinity;
    for (const {x, y} of lines) {
      y.forEach((value, i) => {
        if (!isNumber(value) || x[i] < left || x[i] > right) return;
        low = Math.min(low, value);
        high = Math.max(high, value);
      });
    }
    if (low > high) [low, high] = [1, 1];
    if (isLog) [low, high] = [Math.log10(low), Math.log10(high)];
    const pad = high > low ? 0.06 * (high - low) : 0.1 * Math.abs(low) || 1;
    return [isLog, low - pad, high + pad];
  }

  draw() {
    const width = this.plot.clientWidth, right = width - PAD.right, bottom = HEIGHT - PAD.bottom;
    const [isLog, low, high] = this.axis(), [start, end] = this.range, {lines} = this.figure;
    const toX = step => PAD.left + (step - start) / (end - start) * (right - PAD.left);
    const toY = value => PAD.top + (high - (isLog ? Math.log10(value) : value)) / (high - low) * (bottom - PAD.top);
    this.toX = toX;
    this.toStep = x => start + (x - PAD.left) / (right - PAD.left) * (end - start);
    const at = (x, y) => `${x.toFixed(1)} ${y.toFixed(1)}`;
    const parts = [];
    for (const value of isLog ? logTicks(10 ** low, 10 ** high) : ticks(low, high, 5)) {
      const y = toY(value);
      parts.push(`<path class="grid" d="M${at(PAD.left, y)}H${right}"/>`);
      parts.push(`<text class="y" x="${PAD.left - 6}" y="${y + 4}">${text(value)}</text>`);
    }
    for (const step of ticks(start, end, Math.max(2, width / 70)).filter(step => step >= 0 && Number.isInteger(step))) {
      parts.push(`<path class="grid" d="M${at(toX(step), PAD.top)}V${bottom}"/>`);
      parts.push(`<text class="x" x="${toX(step)}" y="${bottom + 16}">${text(step)}</text>`);
    }
    parts.push(`<text class="x" x="${(PAD.left + right) / 2}" y="${HEIGHT - 5}">step</text>`);
    const inside = `${this.plot.id}-inside`;
    const area = `<rect x="${PAD.left}" width="${right - PAD.left}" height="${bottom}"/>`;
    parts.push(`<clipPath id="${inside}">${area}</clipPath>`);
    for (const {x, y, colour} of lines) {
      let line = "", dots = "", marks = "";
      y.forEach((value, i) => {
        const position = toX(x[i]);
        if (!isNumber(value)) {
          if (x[i] >= start && x[i] <= end) marks += `M${at(position - 4, bottom - 10)}l8 8m0-8l-8 8`;
          return;
        }
        const point = at(position, toY(value));
        line += (isNumber(y[i - 1]) ? "L" : "M") + point;
        if (y.length <= 30 || !(isNumber(y[i - 1]) || isNumber(y[i + 1]))) dots += `M${point}h0`;
      });
      const drawn = [["line", line], ["dots", dots], ["marks", marks]].filter(([, d]) => d);
      parts.push(...drawn.map(([name, d]) =>
        `<path class="${name}" style="stroke: ${colour}" clip-path="url(#${inside})" d="${d}"/>`));
    }
    this.drawing.innerHTML = parts.join("");
    this.show(this.step ?? null);
  }

  /* Shows the values at a step, or the last ones if it is null. */
  show(step) {
    this.step = step;
    const shown = step ?? this.steps.at(-1);
    const said = this.figure.lines.map(({name, x, y}, i) => {
      const last = x.findLastIndex(other => other <= shown);
      const value = last < 0 ? "–" : text(y[last]);
      this.values[i].textContent = value;
      return `${name} ${value}`;
    });
    this.plot.setAttribute("aria-valuenow", shown);
    this.plot.setAttribute("aria-valuetext", `step ${text(shown)}: ${said.join(", ")}`);
    this.plot.parentNode.querySelector(".at").textContent = text(shown);
    const line = `M${this.toX(shown).toFixed(1)} ${PAD.top}V${HEIGHT - PAD.bottom}`;
    this.cursor.setAttribute("d", step === null ? "" : line);
  }

  position(event) {
    return event.clientX - this.plot.getBoundingClientRect().left;
  }

  point(event) {
    const x = this.position(event), step = this.toStep(x);
    this.show(this.steps.reduce((a, b) => Math.abs(b - step) < Math.abs(a - step) ? b : a));
    if (this.pressed === undefined) return;
    this.selected.setAttribute("x", Math.min(x, this.pressed));
    this.selected.setAttribute("width", Math.abs(x - this.pressed));
  }

  press(event) {
    if (event.pointerType !== "mouse" || event.button !== 0) return;
    this.pressed = this.position(event);
    this.plot.setPointerCapture(event.pointerId);
  }

  release(event) {
    if (this.pressed === undefined) return;
    const ends = [this.pressed, this.position(event)].sort((a, b) => a - b);
    this.pressed = undefined;
    this.selected.setAttribute("width", 0);
    if (ends[1] - ends[0] < 8) return;
    this.range = ends.map(this.toStep);
    this.isZoomed = true;
    this.draw();
  }

  key(event) {
    const last = this.steps.length - 1, now = this.steps.indexOf(this.step ?? this.steps[last]);
    const far = Math.ceil(last / 20);
    const moves = {ArrowLeft: now - 1, ArrowRight: now + 1, ArrowDown: now - 1, ArrowUp: now + 1,
      PageDown: now - far, PageUp: now + far, Home: 0, End: last};
    if (event.key in moves) this.show(this.steps[Math.max(0, Math.min(last, moves[event.key]))]);
    else if (event.key === "Enter") this.toggle();
    else return;
    event.preventDefault();
  }
}

const figures = JSON.parse(document.getElementById("figures").textContent);
const charts = figures.map((figure, i) => new Chart(document.getElementById(`plot-${i}`), figure));
log.addEventListener("change", () => charts.forEach(chart => chart.draw()));

/* One picture at a time, by a slider over steps. */
for (const label of document.querySelectorAll(".steps")) {
  const slider = label.querySelector("input"), pictures = label.nextElementSibling.children;
  const show = () => {
    [...pictures].forEach((picture, i) => { picture.hidden = i !== Number(slider.value); });
    slider.setAttribute("aria-valuetext", pictures[slider.value].querySelector("figcaption").textContent);
  };
  slider.addEventListener("input", show);
  label.hidden = false;
  show();
}
