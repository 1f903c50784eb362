// How a photograph and what was read in it looks on the page. Every text from outside is set as text, never as HTML.

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}\u00a0%`;

// Two numbers on different sides of a line must not look the same.
function both(share, threshold) {
  const digits = percent(share) === percent(threshold) && share !== threshold ? 3 : 1;
  return [percent(share, digits), percent(threshold, digits)];
}

const plain = (text) => text.replace(">=", "≥");

export const SIDES = { right: "Right eye", left: "Left eye" };

// The card of one photograph; `does` has what its buttons do.
export class Card {
  constructor(item, does) {
    this.item = item;
    this.does = does;
    this.image = make("img", { alt: "", hidden: true });
    this.still = make("span", {}, "");
    this.side = make("span", { class: "side", hidden: true });
    this.legend = make("span", { class: "legend", hidden: true }, "bright: it counted more");
    this.frame = make("div", { class: "frame" }, this.still, this.image, this.side, this.legend);
    this.result = make("div", { class: "result" });
    this.heat = make("button", { type: "button", class: "small", "aria-pressed": "false", onclick: () => does.heat(item) }, "Heat map");
    this.again = make("button", { type: "button", class: "small", hidden: true, onclick: () => does.again(item) }, "Try again");
    const away = make("button", { type: "button", class: "small away", onclick: () => does.remove(item) }, "Remove");
    away.setAttribute("aria-label", `Remove ${item.name}`);
    this.heat.setAttribute("aria-label", `Heat map of ${item.name}`);
    const id = `photograph-${item.place}`;
    this.said = make("div", { class: "said" },
      make("h3", { id }, make("bdi", {}, item.name)),
      this.result,
      make("p", { class: "use" }, "Research use, not a diagnosis"),
      make("div", { class: "card-tools" }, this.heat, this.again, away),
      this._eye());
    this.element = make("article", { class: "eye-card", "aria-labelledby": id }, this.frame, this.said);
    this.update();
  }

  // Whose eye it is, to be set right.
  _eye() {
    this.eye = make("select", { "aria-label": "Eye", onchange: () => this._said() },
      make("option", { value: "" }, "not known"), make("option", { value: "right" }, "right"), make("option", { value: "left" }, "left"));
    this.patient = make("input", { type: "text", "aria-label": "Patient", maxlength: "200", autocomplete: "off", spellcheck: "false", onchange: () => this._said() });
    return make("details", {}, make("summary", {}, "Patient and eye"),
      make("div", { class: "row" }, make("label", {}, "Eye", this.eye), make("label", {}, "Patient", this.patient)));
  }

  _said() {
    this.item.eye = { patient: this.patient.value.trim(), eye: this.eye.value, byHand: true };
    this.does.regroup();
  }

  update() {
    const { item } = this;
    const { data } = item;
    if (item.eye && document.activeElement !== this.patient) {
      this.patient.value = item.eye.patient;
      this.eye.value = item.eye.eye;
    }
    this.side.hidden = !(item.eye && SIDES[item.eye.eye]);
    this.side.textContent = this.side.hidden ? "" : `${SIDES[item.eye.eye]}${item.eye.byHand || item.paired ? "" : "?"}`;
    this.element.dataset.state = item.state;
    this.still.textContent = { queued: "Waiting", sending: "Sending", waiting: "Waiting", reading: "Being read" }[item.state] || "";
    this.again.hidden = !item.retry;
    this.heat.hidden = item.state !== "done" || this.does.noHeat();
    if (item.state === "failed") {
      this.still.textContent = "No picture";
      this.result.replaceChildren(make("p", { class: "nope" }, "Not read"), make("p", { class: "plain" }, sentence(item.error)));
    } else if (item.state === "done") this.result.replaceChildren(...result(data));
    else this.result.replaceChildren();
    this.show();
  }

  // The photograph, or its heat map where that is wanted and there.
  show() {
    const { item } = this;
    const warm = item.warm && item.heatUrl;
    const url = warm ? item.heatUrl : item.url;
    this.heat.setAttribute("aria-pressed", String(Boolean(item.warm)));
    this.heat.textContent = item.heating ? "Heat map …" : "Heat map";
    this.legend.hidden = !warm;
    this.image.hidden = !url;
    if (url && this.image.src !== url) this.image.src = url;
    this.image.alt = `${item.name}${warm ? ", with its heat map" : ""}`;
  }
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function result(data) {
  const parts = [make("p", { class: "title" }, data.title)];
  // What speaks against a result stands before what follows from it.
  const warnings = [data.unlike, data.flags.length ? `Quality: ${data.flags.join(", ").toLowerCase()}.` : null].filter(Boolean);
  if (warnings.length) parts.push(make("ul", { class: "warnings" }, ...warnings.map((text) => make("li", {}, text))));
  for (const one of data.decisions) parts.push(decision(one));
  if (data.range) {
    const { low, high, level } = data.range;
    parts.push(make("p", { class: "plain" }, `Likely between ${short(low)} and ${short(high)}: such ranges held the true number for ${percent(level, 0)} of validation.`));
  }
  if (data.bars.length) parts.push(bars(data.bars));
  if (data.plausible) parts.push(plausible(data.plausible));
  const undecided = data.bars.filter((bar) => bar.undecided).map((bar) => bar.name);
  if (undecided.length) parts.push(make("p", { class: "plain" }, `Too close to tell: ${undecided.join(", ")}.`));
  return parts;
}

const short = (number) => String(Number(number.toPrecision(4)));

function decision(one) {
  const [share, threshold] = both(one.share, one.threshold);
  const relation = one.positive ? "at or above" : "below";
  return make("p", { class: `decision plain ${one.positive ? "yes" : "no"}` },
    make("strong", {}, `${plain(one.title)}: ${one.positive ? "yes" : "no"}`),
    `${one.what === one.title ? "" : `${plain(one.what)}: `}${share}, ${relation} the threshold of ${threshold}`);
}

function bars(list) {
  const worded = list.some((bar) => bar.name.length > 3);
  const rows = list.map((bar) => {
    const fill = make("span");
    fill.style.width = percent(bar.share, 2).replace("\u00a0", "");
    const called = bar.called ? "called" : null;
    return make("li", { class: called },
      make("span", { class: "name" }, bar.name),
      make("span", { class: "of", "aria-hidden": "true" }, fill),
      make("span", { class: "share" }, percent(bar.share)));
  });
  return make("ul", { class: worded ? "shares worded" : "shares", "aria-label": "Probabilities" }, ...rows);
}

function plausible({ names, level }) {
  const text = names.length ? names.join(", ") : "none";
  return make("p", { class: "plain" }, `Plausible (sets that held the true one for ${percent(level, 0)}): `, make("strong", {}, text));
}

// Two cards as one patient: the right eye on the left, as one faces the patient.
export function pair(patient, right, left, apart) {
  for (const card of [right, left]) {
    card.item.paired = true;
    card.update();
  }
  const byHand = right.item.eye.byHand || left.item.eye.byHand;
  const why = byHand ? "as you said" : `assumed from the names: “${right.item.eye.word}” and “${left.item.eye.word}”`;
  const button = make("button", { type: "button", class: "small", onclick: apart }, "Not one patient");
  return make("section", { class: "pair", "aria-label": `Both eyes of ${patient}` },
    make("header", {}, make("h3", {}, make("bdi", {}, patient)), make("span", { class: "faint" }, why), button),
    make("div", { class: "two" }, right.element, left.element));
}
