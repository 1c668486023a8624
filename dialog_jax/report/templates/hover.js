// The figures of a token: on hover, on focus, and by the arrow keys.
"use strict";

const card = document.getElementById("card");

function quote(text) {
  return JSON.stringify(text).slice(1, -1).replaceAll('\\"', '"').replaceAll("\\\\", "\\");
}

function makeCard(node) {
  const role = roleOf(node);
  const where = node.message < 0 ? "chat template" : `${role}, message ${node.message}`;
  const turn = node.turn >= 0 ? `, turn ${node.turn}` : "";
  const weight = node.weight > 0 ? `weight ${Number(node.weight.toPrecision(4))}` : "weight 0, not trained on";
  const parts = [
    make("p", { class: "word" }, quote(node.text === "" ? node.spelling : node.text)),
    make("p", { class: "detail" }, `token ${node.id} · position ${node.position} · ${where}${turn} · ${weight}`),
  ];
  if (report.models.length) {
    const rows = report.models.map((name, model) => {
      const { loss } = node.scores[model];
      return make("tr", {}, make("th", { scope: "row" }, name), make("td", { "data-loss": model }, formatLoss(loss)), make("td", {}, loss === null ? "–" : formatShare(Math.exp(-loss))));
    });
    for (const { after, before, label } of differences) {
      const change = changeOf(node, after, before);
      const kind = change === null ? null : change < 0 ? "better" : "worse";
      rows.push(make("tr", {}, make("th", { scope: "row" }, label), make("td", { class: kind, "data-change": "" }, formatDifference(change)), make("td", {})));
    }
    const heads = ["", "loss, nats", "probability"].map((text) => make("th", { scope: "col" }, text));
    parts.push(make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows)));
    if (node.scores.every(({ loss }) => loss === null)) {
      parts.push(make("p", { class: "detail" }, node.parent < 0 ? "Nothing predicts a first token." : "Beyond the context of the model."));
    }
    parts.push(...makeAlternatives(node));
  }
  return parts;
}

// Returns a table of the likeliest tokens of each model, side by side.
function makeAlternatives(node) {
  const models = [...report.models.keys()].filter((model) => node.scores[model].top.length);
  if (!models.length) return [];
  const rows = Array.from({ length: report.alternatives }, (_, place) =>
    make("tr", {}, ...models.flatMap((model) => {
      const { token, probability } = node.scores[model].top[place];
      const meter = make("span", { class: "meter", "aria-hidden": "true" }, make("i", { style: `width: ${(100 * probability).toFixed(1)}%` }));
      const word = quote(shown.tree.spellings[token]) + (token === node.token ? " ✓" : "");
      return [make("td", { class: "word-cell" }, word), make("td", {}, formatShare(probability), meter)];
    })),
  );
  const heads = models.map((model) => make("th", { scope: "col", colspan: "2" }, `likeliest ${report.models[model]}`));
  return [make("table", { class: "alternatives" }, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows))];
}

function showCard(span) {
  const node = shown.tree.nodes[Number(span.dataset.node)];
  card.replaceChildren(...makeCard(node));
  card.hidden = false;
  const box = [...span.getClientRects()].at(0) ?? span.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left), innerWidth - card.offsetWidth - 8);
  const below = box.bottom + 8;
  const top = below + card.offsetHeight > innerHeight - 8 ? box.top - card.offsetHeight - 8 : below;
  card.style.left = `${left}px`;
  card.style.top = `${Math.max(8, top)}px`;
}

function hideCard() {
  card.hidden = true;
}

function describeToken(node) {
  const losses = report.models.map((name, model) => `loss ${name} ${formatLoss(node.scores[model].loss, 2)}`);
  const top = node.scores.at(-1)?.top[0];
  const likeliest = top ? `, likeliest ${quote(shown.tree.spellings[top.token])} ${formatShare(top.probability)}` : "";
  return `${quote(node.text || node.spelling)}, ${roleOf(node)}, ${node.weight > 0 ? "trained on" : "not trained on"}${losses.length ? ", " : ""}${losses.join(", ")}${likeliest}`;
}

function focusToken(index, scroll = false) {
  const span = shown.spans.get(index);
  for (const other of shown.order) if (other.tabIndex === 0) other.tabIndex = -1;
  span.tabIndex = 0;
  if (scroll) span.scrollIntoView({ block: "center", behavior: "instant" });
  span.focus({ preventScroll: scroll });
}

// Returns the token above or below: of the nearest line, the one that is nearest horizontally.
function findVertically(span, direction) {
  const here = span.getBoundingClientRect();
  const middle = (here.left + here.right) / 2;
  let [best, bestGap] = [null, Infinity];
  const start = shown.order.indexOf(span);
  for (let i = start + direction, line = null; i >= 0 && i < shown.order.length; i += direction) {
    const box = shown.order[i].getClientRects()[0];
    if (!box || direction * (box.top - here.top) < here.height / 2) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > box.height / 2) break;
    const gap = Math.abs((box.left + box.right) / 2 - middle);
    if (gap < bestGap) [best, bestGap] = [shown.order[i], gap];
  }
  return best;
}

function listenToTokens(container) {
  container.addEventListener("pointerover", (event) => {
    const span = event.target.closest(".t[data-node]");
    if (span) showCard(span);
    else hideCard();
  });
  container.addEventListener("pointerleave", (event) => {
    if (event.pointerType !== "touch") hideCard();
  });
  container.addEventListener("click", (event) => {
    const span = event.target.closest(".t[data-node]");
    if (span) focusToken(Number(span.dataset.node));
  });
  container.addEventListener("focusin", (event) => {
    const span = event.target.closest(".t[data-node]");
    if (!span) return;
    showCard(span);
    document.getElementById("live").textContent = describeToken(shown.tree.nodes[Number(span.dataset.node)]);
  });
  container.addEventListener("focusout", hideCard);
  container.addEventListener("keydown", (event) => {
    const span = event.target.closest(".t[data-node]");
    if (!span) return;
    const place = shown.order.indexOf(span);
    const targets = {
      ArrowRight: () => shown.order[place + 1],
      ArrowLeft: () => shown.order[place - 1],
      ArrowDown: () => findVertically(span, 1),
      ArrowUp: () => findVertically(span, -1),
      Home: () => shown.order[0],
      End: () => shown.order.at(-1),
    };
    if (event.key === "Escape") return document.getElementById("dialogue-heading").focus();
    if (!(event.key in targets)) return;
    event.preventDefault();
    const target = targets[event.key]();
    if (target) focusToken(Number(target.dataset.node));
  });
}

addEventListener("scroll", () => {
  if (!card.hidden && !document.activeElement?.closest(".t")) hideCard();
}, { passive: true });
