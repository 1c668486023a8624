// The list of dialogues: search, sort, and a link to each.
"use strict";

const order = { key: "place", descending: false, search: "", group: "" };
let messages = []; // the text of each dialogue, once it is unpacked
const loweredMessages = [];

const differences = report.differences.map(([after, before]) => ({
  after,
  before,
  label: report.differences.length > 1 ? `${report.models[after]} − ${report.models[before]}` : "change",
}));

const columns = [
  { key: "place", label: "Dialogue", value: (one) => one.place },
  ...(new Set(report.dialogues.map((one) => one.group)).size > 1 ? [{ key: "group", label: "Data", value: (one) => one.group }] : []),
  { key: "turns", label: "Turns", value: (one) => one.turns },
  { key: "tokens", label: "Tokens", value: (one) => one.tokens },
  { key: "targets", label: "Targets", value: (one) => one.targets },
  { key: "branches", label: "Branches", value: (one) => one.branches },
  ...report.models.map((name, model) => ({
    key: `loss-${model}`,
    label: report.models.length > 1 ? `Loss ${name}` : "Loss",
    value: (one) => one.losses[model],
    format: (value) => formatLoss(value),
  })),
  ...differences.map(({ after, before, label }) => ({
    key: `change-${after}-${before}`,
    label: label[0].toUpperCase() + label.slice(1),
    value: (one) => difference(one, after, before),
    format: (value) => formatDifference(value),
    signed: true,
  })),
];

const sorts = [
  { key: "place", descending: false, label: "order in the data" },
  ...[...report.models.keys()].reverse().map((model) => ({ key: `loss-${model}`, descending: true, label: `loss ${report.models[model]}, highest first` })),
  ...differences.flatMap(({ after, before, label }) => [
    { key: `change-${after}-${before}`, descending: false, label: `${label}, most improved first` },
    { key: `change-${after}-${before}`, descending: true, label: `${label}, least improved first` },
  ]),
  { key: "tokens", descending: true, label: "length, longest first" },
  { key: "tokens", descending: false, label: "length, shortest first" },
  { key: "branches", descending: true, label: "branches, most first" },
];

function difference(one, after, before) {
  const [a, b] = [one.losses[after], one.losses[before]];
  return a === null || b === null ? null : a - b;
}

function selectDialogues() {
  const column = columns.find(({ key }) => key === order.key) ?? columns[0];
  const words = order.search.toLowerCase().split(/\s+/).filter(Boolean);
  const selected = report.dialogues.filter(
    (one) =>
      (!order.group || one.group === order.group) &&
      words.every((word) => (loweredMessages[one.place] ?? one.snippet.toLowerCase()).includes(word) || one.name.toLowerCase().includes(word)),
  );
  const sign = order.descending ? -1 : 1;
  return selected.sort((a, b) => {
    const [x, y] = [column.value(a), column.value(b)];
    if (x === y) return a.place - b.place;
    if (x === null || y === null) return x === null ? 1 : -1; // what has no figure comes last
    return (x < y ? -1 : 1) * sign;
  });
}

// Returns the text around the first place of a word, with the word marked.
function makeSnippet(one) {
  const word = order.search.toLowerCase().split(/\s+/).find(Boolean);
  const place = word ? (loweredMessages[one.place] ?? "").indexOf(word) : -1;
  if (place < 0) return [one.snippet];
  const text = messages[one.place];
  const start = Math.max(0, place - 50);
  return [
    (start ? "…" : "") + text.slice(start, place),
    make("mark", {}, text.slice(place, place + word.length)),
    text.slice(place + word.length, place + 130),
  ];
}

function showList() {
  const selected = selectDialogues();
  const rows = selected.map((one) => {
    const link = make("a", { href: `#/dialogue/${one.place}` }, one.name);
    const cells = columns.slice(1).map((column) => {
      const value = column.value(one);
      const text = column.format ? column.format(value) : typeof value === "number" ? integer.format(value) : value;
      const kind = column.signed && value !== null && Math.abs(value) >= 0.0005 ? (value < 0 ? "better" : "worse") : null;
      return make("td", { "data-label": column.label, class: kind }, text);
    });
    return make("tr", {}, make("th", { scope: "row" }, link, make("span", { class: "snippet" }, ...makeSnippet(one))), ...cells);
  });
  document.querySelector("#list tbody").replaceChildren(...rows);
  document.getElementById("count").textContent = `${integer.format(selected.length)} of ${integer.format(report.dialogues.length)} dialogues`;
  for (const heading of document.querySelectorAll("#list thead th")) {
    const isKey = heading.dataset.key === order.key;
    heading.setAttribute("aria-sort", isKey ? (order.descending ? "descending" : "ascending") : "none");
    heading.querySelector(".arrow").textContent = isKey ? (order.descending ? " ▼" : " ▲") : "";
  }
  const index = sorts.findIndex(({ key, descending }) => key === order.key && descending === order.descending);
  document.getElementById("sort").value = index < 0 ? "" : String(index);
}

function prepareList() {
  const headings = columns.map((column) => {
    const sort = () => {
      const descending = order.key === column.key ? !order.descending : !(column.key === "place" || column.key === "group" || column.signed);
      Object.assign(order, { key: column.key, descending });
      showList();
    };
    const button = make("button", { type: "button", onclick: sort }, column.label, make("span", { class: "arrow", "aria-hidden": "true" }));
    return make("th", { scope: "col", "data-key": column.key }, button);
  });
  document.querySelector("#list thead").append(make("tr", {}, ...headings));
  const sortSelect = document.getElementById("sort");
  sortSelect.append(...sorts.map(({ label }, index) => make("option", { value: index }, label)), make("option", { value: "", hidden: "" }, "a column"));
  sortSelect.addEventListener("change", () => {
    const { key, descending } = sorts[Number(sortSelect.value)];
    Object.assign(order, { key, descending });
    showList();
  });
  const groups = [...new Set(report.dialogues.map((one) => one.group))];
  document.getElementById("group-label").hidden = groups.length < 2;
  const groupSelect = document.getElementById("group");
  groupSelect.append(make("option", { value: "" }, "all"), ...groups.map((name) => make("option", { value: name }, name)));
  groupSelect.addEventListener("change", () => {
    order.group = groupSelect.value;
    showList();
  });
  const search = document.getElementById("search");
  search.addEventListener("input", () => {
    order.search = search.value;
    showList();
  });
  document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
  showList();
  unpackJson("search-texts").then((texts) => {
    messages = texts;
    texts.forEach((text, index) => (loweredMessages[index] = text.toLowerCase()));
    if (order.search) showList();
  });
}
