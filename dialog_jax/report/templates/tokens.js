// Reads the packed tokens of dialogues; token_columns.py describes the format.
"use strict";

const report = JSON.parse(document.getElementById("report-data").textContent);
const NOT_SCORED = 0xffffffff;

async function unpack(id) {
  const packed = atob(document.getElementById(id).textContent);
  const bytes = Uint8Array.from(packed, (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function unpackJson(id) {
  return JSON.parse(new TextDecoder().decode(await unpack(id)));
}

let textsPromise;
function loadTexts() {
  textsPromise ??= unpackJson("texts");
  return textsPromise;
}

// Returns the columns of `size` numbers; byte 0 of all numbers of a column comes before byte 1 of all.
function splitColumns(bytes, size) {
  const columns = [];
  for (let start = 0; start < bytes.length; start += 4 * size) {
    const column = new Uint32Array(size);
    for (let plane = 0; plane < 4; plane++) {
      for (let i = 0; i < size; i++) column[i] |= bytes[start + plane * size + i] << (8 * plane);
    }
    columns.push(column);
  }
  return columns;
}

// Returns the tree of a dialogue: for each node its parent, children, position, text, token, message, turn, weight, and
// for each model its loss (null if it is not scored) and its likeliest tokens.
async function loadTree(index) {
  const [texts, bytes] = await Promise.all([loadTexts(), unpack(`dialogue-${index}`)]);
  const size = report.dialogues[index].tokens;
  const columns = splitColumns(bytes, size);
  const [gap, text, token, message, turn, weightBits] = columns;
  const weight = new Float32Array(weightBits.buffer);
  const width = 1 + 2 * report.alternatives;
  const nodes = [];
  for (let i = 0; i < size; i++) {
    const parent = gap[i] ? i - gap[i] : -1;
    const scores = report.models.map((_, model) => {
      const first = 6 + model * width;
      if (columns[first][i] === NOT_SCORED) return { loss: null, top: [] };
      const top = [];
      for (let k = 0; k < report.alternatives; k++) {
        top.push({
          token: columns[first + 1 + 2 * k][i],
          probability: columns[first + 2 + 2 * k][i] / report.shares,
        });
      }
      return { loss: columns[first][i] / report.nats, top };
    });
    nodes.push({
      index: i,
      parent,
      children: [],
      position: parent < 0 ? 0 : nodes[parent].position + 1,
      text: texts.strings[text[i]],
      token: token[i],
      id: texts.ids[token[i]],
      spelling: texts.spellings[token[i]],
      message: message[i] - 1,
      turn: turn[i] - 1,
      weight: weight[i],
      scores,
    });
    if (parent >= 0) nodes[parent].children.push(i);
  }
  const sizes = new Array(size).fill(1);
  for (let i = size - 1; i >= 0; i--) if (nodes[i].parent >= 0) sizes[nodes[i].parent] += sizes[i];
  nodes.forEach((node, i) => (node.subtree = sizes[i]));
  return { nodes, roots: nodes.filter((node) => node.parent < 0).map((node) => node.index), spellings: texts.spellings };
}

// Returns the largest of some nodes by their subtree, the last of equal ones: the one that a page continues with.
function findTrunk(tree, children) {
  return children.reduce((best, child) => (tree.nodes[child].subtree >= tree.nodes[best].subtree ? child : best));
}

// Returns an element: make("p", {class: "note"}, "text", otherElement).
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}

const integer = new Intl.NumberFormat("en");
function formatLoss(value, digits = 3) {
  return value === null || value === undefined ? "–" : value.toFixed(digits);
}
function formatDifference(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const text = Math.abs(value).toFixed(digits);
  return Number(text) === 0 ? text : `${value < 0 ? "−" : "+"}${text}`;
}
function formatShare(share) {
  if (share > 0 && share < 0.0001) return "< 0.01 %";
  return share >= 0.0995 ? `${(100 * share).toFixed(0)} %` : `${(100 * share).toFixed(share >= 0.01 ? 1 : 2)} %`;
}
