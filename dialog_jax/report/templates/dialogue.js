// One dialogue: as chat bubbles along one path, and as its tree with every branch.
"use strict";

const MOST_NATS = 8; // loss of the strongest color
const MOST_CHANGE = 2; // change of the loss, in nats, of the strongest color
const ROLE_NAMES = { template: "chat template" };

const view = {
  layout: "chat",
  color: report.models.length ? (report.differences.length ? "loss-1" : "loss-0") : "weight",
  template: false,
  chosen: new Map(), // node -> the child that the chat continues with
};
let shown = null; // {place, entry, tree, spans}

const colorings = [
  ...report.models.map((name, model) => ({ key: `loss-${model}`, label: `loss ${name}` })),
  ...differences.map(({ after, before, label }) => ({ key: `change-${after}-${before}`, label })),
  { key: "weight", label: "weights" },
];

function roleOf(node) {
  return node.message < 0 ? "template" : shown.entry.roles[node.message];
}

function changeOf(node, after, before) {
  const [a, b] = [node.scores[after].loss, node.scores[before].loss];
  return a === null || b === null ? null : a - b;
}

function colorSpan(span, node) {
  span.classList.remove("hot", "good", "bad", "weigh", "dark");
  const [kind, ...models] = view.color.split("-");
  let strength = 0;
  let name = "hot";
  if (kind === "loss") strength = (node.scores[models[0]].loss ?? 0) / MOST_NATS;
  if (kind === "change") {
    const change = changeOf(node, ...models) ?? 0;
    [strength, name] = [Math.abs(change) / MOST_CHANGE, change < 0 ? "good" : "bad"];
  }
  if (kind === "weight") [strength, name] = [node.weight / shown.largestWeight, "weigh"];
  strength = Math.min(1, strength) ** 0.85;
  if (strength < 0.02) return;
  span.classList.add(name);
  if (strength > 0.35) span.classList.add("dark");
  span.style.setProperty("--a", (0.9 * strength).toFixed(3));
}

// Control characters become symbols; a line break also stays one.
function visibleText(node) {
  if (node.text === "") return "·";
  return node.text.replaceAll("\n", "⏎\n").replaceAll("\t", "⇥").replace(/[\u0000-\u0008\u000b-\u001f]/g, (one) => String.fromCharCode(0x2400 + one.charCodeAt(0)));
}

function makeSpan(node) {
  const isTarget = node.weight > 0;
  const span = make("span", { class: `t${isTarget ? " on" : ""}${isTarget && node.weight !== 1 ? " part" : ""}`, "data-node": node.index, tabindex: "-1" });
  const text = visibleText(node);
  if (/[⏎⇥]|^·$/.test(text) && text !== node.text) {
    for (const part of text.split(/([⏎⇥·])/)) span.append(/^[⏎⇥·]$/.test(part) ? make("span", { class: "mark" }, part) : part);
  } else span.textContent = text;
  colorSpan(span, node);
  shown.spans.set(node.index, span);
  return span;
}

// Returns the spans of nodes that follow one another, with a label where the weight becomes another than 0 and 1.
function makeTokens(nodes) {
  const parts = [];
  let weight = 1;
  for (const node of nodes) {
    if (node.weight !== weight && node.weight > 0 && node.weight !== 1) {
      parts.push(make("span", { class: "weight-label", title: "weight in the loss" }, `×${Number(node.weight.toPrecision(3))}`));
    }
    if (node.weight > 0) weight = node.weight;
    parts.push(makeSpan(node));
  }
  return make("div", { class: "tokens", dir: "auto" }, ...parts);
}

function meanLoss(nodes, model) {
  let [sum, weight] = [0, 0];
  for (const node of nodes) {
    if (node.weight > 0 && node.scores[model].loss !== null) {
      sum += node.weight * node.scores[model].loss;
      weight += node.weight;
    }
  }
  return weight ? sum / weight : null;
}

// Returns the lines above the tokens of a message: role, turn, and the loss of what is trained.
function makeHeader(nodes) {
  const role = roleOf(nodes[0]);
  const targets = nodes.filter((node) => node.weight > 0);
  const header = make("header", {}, make("span", { class: `role ${role}` }, ROLE_NAMES[role] ?? role));
  if (!targets.length) {
    if (role !== "template") header.append(make("span", {}, `${integer.format(nodes.length)} token${nodes.length > 1 ? "s" : ""}, not trained`));
    return header;
  }
  const turn = targets[0].turn;
  header.append(make("span", {}, (turn >= 0 ? `turn ${turn}, ` : "") + `${integer.format(targets.length)} target${targets.length > 1 ? "s" : ""}`));
  const losses = report.models.map((_, model) => meanLoss(nodes, model));
  if (losses.some((loss) => loss !== null)) {
    header.append(make("span", {}, `loss ${losses.map((loss) => formatLoss(loss, 2)).join(" → ")}`));
    for (const { after, before } of differences) {
      if (losses[after] === null || losses[before] === null) continue;
      const change = losses[after] - losses[before];
      header.append(make("span", { class: change < 0 ? "better" : "worse" }, formatDifference(change, 2)));
    }
  }
  return header;
}

// Divides nodes that follow one another into those of the same message and those of the template between them.
function splitByMessage(nodes) {
  const groups = [];
  for (const node of nodes) {
    const group = groups.at(-1);
    if (group && group[0].message === node.message) group.push(node);
    else groups.push([node]);
  }
  return groups;
}

// Returns the nodes from `start` to the next branch or leaf.
function followRun(start) {
  const { nodes } = shown.tree;
  const run = [nodes[start]];
  while (run.at(-1).children.length === 1) run.push(nodes[run.at(-1).children[0]]);
  return run;
}

function describeBranch(child) {
  const { nodes } = shown.tree;
  const subtree = nodes.slice(child, child + nodes[child].subtree);
  const turns = [...new Set(subtree.filter((node) => node.weight > 0 && node.turn >= 0).map((node) => node.turn))];
  const trained = turns.length ? `trains turn${turns.length > 1 ? "s" : ""} ${turns.join(", ")}` : "trains no response";
  return `${integer.format(subtree.length)} tokens, ${trained}`;
}

function makeFork(key, children, chosen) {
  const buttons = children.map((child, index) => {
    const choose = () => {
      view.chosen.set(key, child);
      showLayout();
      document.querySelector(`[data-fork="${key}"] [aria-pressed="true"]`)?.focus();
    };
    return make("button", { type: "button", "aria-pressed": String(child === chosen), onclick: choose }, `${index + 1}: ${describeBranch(child)}`);
  });
  return make("div", { class: "fork", role: "group", "aria-label": "branches", "data-fork": key },
    make("p", {}, `The tree branches here into ${children.length}; the chat continues with`), make("div", { class: "bar" }, ...buttons));
}

function makeChat() {
  const container = make("div", { class: "bubbles" });
  let children = shown.tree.roots;
  let key = -1;
  shown.hidden = 0;
  while (children.length) {
    let child = children[0];
    if (children.length > 1) {
      child = view.chosen.get(key) ?? findTrunk(shown.tree, children);
      container.append(makeFork(key, children, child));
    }
    const run = followRun(child);
    for (const group of splitByMessage(run)) {
      const role = roleOf(group[0]);
      if (role === "template" && !view.template && group.every((node) => node.weight === 0)) {
        shown.hidden += group.length;
        continue;
      }
      const kind = role === "template" ? "strip" : `bubble ${role}`;
      container.append(make("section", { class: kind, "aria-label": ROLE_NAMES[role] ?? role }, role === "template" ? "" : makeHeader(group), makeTokens(group)));
    }
    key = run.at(-1).index;
    children = run.at(-1).children;
  }
  return container;
}

function makeTree() {
  const container = make("div", { class: "tree" });
  const stack = [{ children: shown.tree.roots, place: container }];
  while (stack.length) {
    let { children, place } = stack.pop();
    while (children.length) {
      const trunk = findTrunk(shown.tree, children);
      const branches = children.filter((child) => child !== trunk);
      for (const child of branches) {
        const label = make("span", { class: "label" }, `branch: ${describeBranch(child)}`);
        const branch = make("section", { class: "branch", "aria-label": `branch of ${describeBranch(child)}` }, label);
        place.append(branch);
        stack.push({ children: [child], place: branch });
      }
      if (branches.length) place.append(make("p", { class: "trunk" }, `continues: ${describeBranch(trunk)}`));
      const run = followRun(trunk);
      for (const group of splitByMessage(run)) place.append(make("div", { class: "segment" }, makeHeader(group), makeTokens(group)));
      children = run.at(-1).children;
    }
  }
  return container;
}

function makeSvg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Draws the tree: a line for each path, from left to right by position; trained tokens are high, others low.
function makeMap() {
  const { nodes, roots } = shown.tree;
  const width = 1000;
  const length = nodes.reduce((most, node) => Math.max(most, node.position), 0) + 1;
  const scale = (width - 20) / length;
  const gap = 22;
  const shapes = [];
  let lines = 0;
  const stack = [{ children: roots, line: 0 }];
  while (stack.length) {
    const { children, line } = stack.pop();
    if (!children.length) continue;
    const trunk = findTrunk(shown.tree, children);
    const run = followRun(trunk);
    const y = 14 + gap * line;
    for (const group of splitByMessage(run).flatMap(splitByTarget)) {
      const isTarget = group[0].weight > 0;
      const role = roleOf(group[0]);
      const x = 10 + scale * group[0].position;
      const height = isTarget ? 14 : 5;
      const label = `${ROLE_NAMES[role] ?? role}: ${group.length} tokens${isTarget ? ", trained" : ""}`;
      shapes.push(makeSvg("rect", { class: role, x, y: y - height / 2, width: Math.max(1, scale * group.length - 0.5), height, "data-goto": group[0].index }, makeSvg("title", {}, label)));
    }
    const end = run.at(-1);
    stack.push({ children: end.children, line });
    for (const child of children.filter((one) => one !== trunk)) {
      lines += 1;
      const x = 10 + scale * nodes[child].position;
      shapes.unshift(makeSvg("path", { d: `M${x - 3} ${y} V${14 + gap * lines} H${x}` }));
      stack.push({ children: [child], line: lines });
    }
  }
  const height = 28 + gap * lines;
  const branches = lines ? `${lines + 1} branches` : "no branch";
  const map = makeSvg("svg", { class: "map", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `The tree of ${nodes.length} tokens from left to right, ${branches}; high bars are trained` }, ...shapes);
  map.addEventListener("click", (event) => {
    const target = event.target.closest("[data-goto]");
    if (!target) return;
    if (!shown.spans.has(Number(target.dataset.goto))) setLayout("tree");
    focusToken(Number(target.dataset.goto), true);
  });
  return map;
}

function splitByTarget(nodes) {
  const groups = [];
  for (const node of nodes) {
    const group = groups.at(-1);
    if (group && group[0].weight > 0 === node.weight > 0) group.push(node);
    else groups.push([node]);
  }
  return groups;
}

function makeSegments(legend, name, options, chosen, choose) {
  const labels = options.map(({ key, label }) => {
    const input = make("input", { type: "radio", name, value: key, onchange: () => choose(key) });
    input.checked = key === chosen;
    return make("label", {}, input, make("span", {}, label));
  });
  return make("fieldset", { class: "segments" }, make("legend", {}, legend), ...labels);
}

function makeLegend() {
  const [kind] = view.color.split("-");
  const mix = (name, share) => `color-mix(in srgb, var(--${name}) ${share}%, transparent)`;
  const ramp = (style) => make("span", { class: "ramp", style: `background: linear-gradient(90deg, ${style})`, "aria-hidden": "true" });
  const scale = {
    loss: () => [`0`, ramp(`${mix("hot", 0)}, ${mix("hot", 90)}`), `${MOST_NATS} nats or more`],
    change: () => [`−${MOST_CHANGE} nats, better`, ramp(`${mix("good", 90)}, ${mix("good", 0)}, ${mix("bad", 90)}`), `+${MOST_CHANGE}, worse`],
    weight: () => ["weight 0", ramp(`${mix("weight", 0)}, ${mix("weight", 90)}`), `${Number(shown.largestWeight.toPrecision(3))}`],
  }[kind]();
  return make("div", { class: "legend" }, make("span", {}, ...scale),
    make("span", {}, make("span", { class: "t on dark" }, "trained on"), " ", make("span", { class: "t" }, "not trained on")),
    make("span", {}, "⏎ line break · part of a character"),
    make("span", {}, "hover over a token, tap it, or use the arrow keys"));
}

function setLayout(layout) {
  view.layout = layout;
  const input = document.querySelector(`input[name="layout"][value="${layout}"]`);
  if (input) input.checked = true;
  showLayout();
}

function showLayout() {
  shown.spans = new Map();
  const body = view.layout === "chat" ? makeChat() : makeTree();
  const tokens = make("div", { id: "tokens", role: "group", "aria-label": "Tokens. The arrow keys move from token to token, Escape leaves." }, body);
  document.getElementById("tokens").replaceWith(tokens);
  document.getElementById("template-toggle").hidden = view.layout !== "chat";
  document.getElementById("hidden-count").textContent = shown.hidden ? ` (${integer.format(shown.hidden)} hidden)` : "";
  shown.order = [...tokens.querySelectorAll(".t[data-node]")];
  shown.order[0]?.setAttribute("tabindex", "0");
  listenToTokens(tokens);
  hideCard();
}

function recolor() {
  for (const [index, span] of shown.spans) colorSpan(span, shown.tree.nodes[index]);
  document.querySelector("#dialogue .legend").replaceWith(makeLegend());
}

async function openDialogue(place) {
  const article = document.getElementById("dialogue");
  const entry = report.dialogues[place];
  const tree = await loadTree(place);
  shown = { place, entry, tree, spans: new Map(), largestWeight: tree.nodes.reduce((most, node) => Math.max(most, node.weight), 0) };
  view.chosen = new Map();
  const listed = selectDialogues().map((one) => one.place);
  const index = listed.indexOf(place);
  const move = (step, label) => {
    const target = index < 0 ? undefined : listed[index + step];
    return make("button", { type: "button", disabled: target === undefined ? "" : null, onclick: () => (location.hash = `#/dialogue/${target}`) }, label);
  };
  const facts = [`${integer.format(entry.tokens)} tokens`, `${integer.format(entry.targets)} targets`, `${entry.turns} turns`, entry.branches > 1 ? `${entry.branches} branches` : "one path"];
  const losses = report.models.map((name, model) => `loss ${name} ${formatLoss(entry.losses[model])}`);
  const toggle = make("label", { id: "template-toggle" });
  const box = make("input", { type: "checkbox", onchange: () => ((view.template = box.checked), showLayout()) });
  box.checked = view.template;
  toggle.append(box, " template tokens", make("span", { id: "hidden-count", class: "note" }));
  article.replaceChildren(
    make("div", { class: "bar" }, make("a", { href: "#dialogues" }, "← All dialogues"), make("span", { class: "bar right" }, move(-1, "← previous"), move(1, "next →"))),
    make("h1", { id: "dialogue-heading", tabindex: "-1" }, entry.name),
    make("p", { class: "lead" }, [entry.group, ...facts, ...losses].join(" · ")),
    make("div", { class: "toolbar" },
      makeSegments("Show", "layout", [{ key: "chat", label: "chat" }, { key: "tree", label: "tree" }], view.layout, setLayout),
      makeSegments("Color by", "color", colorings, view.color, (key) => ((view.color = key), recolor())),
      toggle),
    makeLegend(),
    makeMap(),
    make("div", { id: "tokens" }),
  );
  showLayout();
}
