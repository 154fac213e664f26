// The page of `glsim serve`: sends an image to POST /predict, once a panel, and shows what comes back.

const $ = (selector, inside = document) => inside.querySelector(selector);
const panels = [];
let model; // what GET /model says
let image; // the file that is shown

class Problem extends Error {
  constructor(text, again) {
    super(text);
    this.again = again; // whether the same request may work a little later
  }
}

async function start() {
  try {
    const response = await fetch("model");
    if (!response.ok) throw new Error();
    model = await response.json();
  } catch {
    return say(new Problem("The server does not answer. Is glsim serve still running?", true), start);
  }
  hush();
  document.title = `${model.name} · glsim`;
  const [height, width] = model.image_size;
  const method = model.method === "glsim" ? "GLSim" : model.method;
  $("#about").textContent =
    `${model.name}: ${model.labels.length} classes, ${method} on ${model.backbone}, ${width} × ${height} pixels`;
  const { bytes, pixels } = model.limits;
  $("#limits").textContent = `Up to ${round(bytes / 1e6)} MB and ${round(pixels / 1e6)} megapixels; nothing is stored.`;
  $("#honesty").textContent = model.calibrated
    ? "Probabilities are calibrated on validation images."
    : "Probabilities are the softmax of the model's logits; they were not calibrated.";
  showExamples();
  if (!panels.length) addPanel(model.metrics[0].name);
  if (image) choose(image); // it was faster
}

const round = (number) => Number(number.toPrecision(3));
const words = (label) => label.replaceAll("_", " ");
const percent = (p) => (p > 0 && p < 0.0005 ? "< 0.1 %" : `${(100 * p).toFixed(1)} %`);

// --- choosing an image ---------------------------------------------------------------------------------------------

function showExamples() {
  $("#examples").hidden = !model.examples.length;
  $("#examples-title").textContent = model.drawn
    ? "Or try the page with a drawn bird (glsim serve --examples FOLDER puts photographs here)"
    : "Or try one of these";
  $("#thumbnails").replaceChildren(
    ...model.examples.map((name, i) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      const picture = document.createElement("img");
      picture.src = `thumbnails/${i}`;
      picture.alt = `Example: ${name}`;
      button.append(picture);
      button.addEventListener("click", () => example(i, name, button));
      item.append(button);
      return item;
    }),
  );
}

async function example(i, name, button) {
  try {
    const response = await fetch(`examples/${i}`);
    if (!response.ok) throw new Error();
    choose(new File([await response.arrayBuffer()], name));
    button.setAttribute("aria-pressed", "true");
  } catch {
    say(new Problem("The server does not answer. Is glsim serve still running?", true), () => example(i, name, button));
  }
}

function choose(file) {
  for (const button of document.querySelectorAll("#thumbnails button")) button.removeAttribute("aria-pressed");
  image = file;
  if (!model) return; // start() comes back to it
  if (file.size > model.limits.bytes) {
    const megabytes = [file.size, model.limits.bytes].map((bytes) => round(bytes / 1e6));
    return failed(new Problem(`${file.name} is too large: ${megabytes[0]} MB, limit ${megabytes[1]} MB.`));
  }
  document.body.classList.add("chosen");
  $("#choose").textContent = "Another image";
  $("#result").hidden = false;
  for (const panel of panels) panel.clear();
  ask(...panels);
}

// --- asking --------------------------------------------------------------------------------------------------------

async function ask(...which) {
  hush();
  $("#status").textContent = "Asking the model";
  const answers = await Promise.allSettled(which.map((panel) => panel.ask()));
  const wrong = answers.find((a) => a.status === "rejected" && a.reason.name !== "AbortError");
  if (wrong) return failed(wrong.reason, which);
  if (answers.every((a) => a.status === "fulfilled")) compare();
}

function failed(problem, which = panels) {
  if (!(problem instanceof Problem)) console.error(problem);
  if (!problem.again) {
    // An answer to the image before must not stand beside the word that this one is bad.
    $("#result").hidden = true;
  }
  say(problem, () => ask(...which));
}

function say(problem, again) {
  $("#status").textContent = "";
  $("#problem-text").textContent = problem.message;
  $("#problem").hidden = false;
  $("#retry").hidden = !problem.again;
  $("#retry").onclick = again;
}

const hush = () => ($("#problem").hidden = true);

async function predict(file, query, signal) {
  const form = new FormData();
  form.append("images", file, file.name);
  for (let attempt = 1; ; attempt++) {
    let response, body;
    try {
      response = await fetch(`predict?${new URLSearchParams(query)}`, { method: "POST", body: form, signal });
      body = await response.json();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("The server does not answer. Is glsim serve still running?", true);
    }
    if (response.ok) return body.predictions[0];
    if (response.status === 503 && attempt < 6) {
      const seconds = Number(response.headers.get("Retry-After")) || 1;
      await new Promise((wake) => setTimeout(wake, 1000 * seconds));
      continue;
    }
    const bad = [400, 413, 415].includes(response.status);
    throw new Problem("path" in body ? `${file.name} cannot be read: ${body.error}.` : `${body.error}.`, !bad);
  }
}

// --- a panel: one mechanism, one answer ----------------------------------------------------------------------------

class Panel {
  constructor(metric) {
    this.element = $("#panel").content.firstElementChild.cloneNode(true);
    this.element.classList.add("empty");
    this.mechanism = $("select", this.element);
    [this.slider, this.number] = this.element.querySelectorAll(".patches input");
    const [own, ...others] = model.metrics.map(({ name, title }) => new Option(title, name));
    const choices = model.crops ? [group("The model's own", own), group("Others", ...others)] : [own, ...others];
    this.mechanism.append(...choices);
    this.mechanism.value = metric;
    for (const input of [this.slider, this.number]) {
      input.max = model.patches;
      input.value = model.top_o;
      input.addEventListener("input", () => this.setPatches(input));
    }
    this.number.addEventListener("change", () => (this.number.value = this.slider.value));
    this.mechanism.addEventListener("change", () => this.changed());
    this.describe();
  }

  get metric() {
    return model.metrics.find((m) => m.name === this.mechanism.value);
  }

  setPatches(input) {
    if (!input.checkValidity() || !input.value) return;
    for (const other of [this.slider, this.number]) if (other !== input) other.value = input.value;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.changed(), 120);
  }

  changed() {
    this.describe();
    ask(this);
  }

  describe() {
    $(".patches", this.element).hidden = !this.metric.top_o;
    const about = [this.metric.about];
    if (!this.metric.decides) about.push("It only draws: this model's answer does not depend on it.");
    else if (this.metric !== model.metrics[0]) about.push(`The model was trained with ${model.metrics[0].title}.`);
    $(".metric-about", this.element).textContent = about.filter(Boolean).join(" ");
  }

  clear() {
    this.element.classList.add("empty");
    this.found = null;
  }

  async ask() {
    this.pending?.abort();
    const { signal } = (this.pending = new AbortController());
    const query = { explain: true, metric: this.metric.name };
    if (this.metric.top_o) query.top_o = this.slider.value;
    this.element.setAttribute("aria-busy", "true");
    try {
      this.show(await predict(image, query, signal));
    } finally {
      if (!signal.aborted) this.element.setAttribute("aria-busy", "false");
    }
  }

  show(found) {
    const { answers, explanation: why, second_pass: second } = found;
    this.found = found;
    this.element.classList.remove("empty");
    $(".photo", this.element).src = why.photo;
    $(".heat", this.element).src = why.heatmap;
    const [width, height] = why.size;
    $(".stack", this.element).style.setProperty("--ratio", width / height);
    $(".stage figcaption", this.element).textContent = `${image.name} (coloured: what the model sees)`;
    const frame = $(".frame", this.element).style;
    const [left, top, right, bottom] = why.box;
    frame.left = `${(100 * left) / width}%`;
    frame.top = `${(100 * top) / height}%`;
    frame.width = `${(100 * (right - left)) / width}%`;
    frame.height = `${(100 * (bottom - top)) / height}%`;
    $(".crop img", this.element).src = why.crop;
    const part = `The part in the box, ${right - left} × ${bottom - top} of ${width} × ${height} pixels.`;
    $(".crop figcaption", this.element).textContent = `${part} ${how(why.used, second)}`;
    $(".answers", this.element).replaceChildren(...answers.map(row));
    $("#status").textContent = `${words(answers[0].label)}, ${percent(answers[0].probability)}`;
  }
}

function group(label, ...options) {
  const element = document.createElement("optgroup");
  element.label = label;
  element.append(...options);
  return element;
}

function how(used, second) {
  if (second === false) return "The first look was sure enough without it.";
  return used && model.method === "glsim" ? "GLSim looked at it a second time." : "";
}

function row({ label, probability }) {
  const item = document.createElement("li");
  const [name, value, bar, part] = ["span", "span", "div", "span"].map((tag) => document.createElement(tag));
  name.className = "name";
  name.textContent = words(label);
  value.textContent = percent(probability);
  bar.className = "bar";
  part.style.width = `${100 * probability}%`;
  bar.append(part);
  item.append(name, value, bar);
  return item;
}

function addPanel(metric) {
  const panel = new Panel(metric);
  panels.push(panel);
  $("#panels").append(panel.element);
  $("#panels").classList.toggle("two", panels.length === 2);
  return panel;
}

function removePanel() {
  const panel = panels.pop();
  panel.pending?.abort();
  panel.element.remove();
  $("#panels").classList.remove("two");
}

// --- comparing -----------------------------------------------------------------------------------------------------

function compare() {
  const found = panels.map((panel) => panel.found);
  $("#difference").hidden = panels.length < 2 || !found.every(Boolean);
  if ($("#difference").hidden) return;
  const [a, b] = found.map(({ answers }) => words(answers[0].label));
  const overlap = `the boxes overlap by ${Math.round(100 * iou(...found.map((f) => f.explanation.box)))} %`;
  $("#difference").textContent =
    a === b ? `Both answer ${a}; ${overlap}.` : `The first answers ${a}, the second ${b}; ${overlap}.`;
}

function iou(a, b) {
  const side = (i) => Math.max(0, Math.min(a[i + 2], b[i + 2]) - Math.max(a[i], b[i]));
  const area = ([left, top, right, bottom]) => (right - left) * (bottom - top);
  const both = side(0) * side(1);
  return both / (area(a) + area(b) - both);
}

$("#compare").addEventListener("change", ({ target }) => {
  if (!target.checked) {
    removePanel();
    return compare();
  }
  const first = panels[0].metric.name;
  const liked = ["attention", "gls_cos", ...model.metrics.map((m) => m.name)];
  const other = liked.find((name) => name !== first && model.metrics.some((m) => m.name === name));
  ask(addPanel(other ?? first));
});

$("#box").addEventListener("change", ({ target }) => $("#panels").classList.toggle("no-box", !target.checked));
$("#opacity").addEventListener("input", ({ target }) => $("#panels").style.setProperty("--heat", target.value / 100));

// --- ways in -------------------------------------------------------------------------------------------------------

$("#file").addEventListener("change", ({ target }) => {
  if (target.files[0]) choose(target.files[0]);
  target.value = ""; // the same file may be chosen again
});

let depth = 0; // of elements that something is dragged over
addEventListener("dragenter", (event) => {
  depth += event.dataTransfer.types.includes("Files");
  document.body.classList.toggle("over", depth > 0);
});
addEventListener("dragleave", (event) => {
  depth -= event.dataTransfer.types.includes("Files");
  document.body.classList.toggle("over", depth > 0);
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  depth = 0;
  document.body.classList.remove("over");
  const file = event.dataTransfer.files[0];
  if (file) choose(file);
});
addEventListener("paste", (event) => {
  const file = event.clipboardData.files[0];
  if (file) choose(file);
});

start();
