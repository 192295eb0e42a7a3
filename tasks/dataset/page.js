"use strict";
// Everything that comes from the data reaches the page as text or as an attribute, never as HTML.

const GALLERY_STEP = 48, TABLE_PAGE = 100;
const STATES = ["failed", "invalid", "failure", "warning", "pending", "normal"]; // worst first
const COLUMNS = [
  { key: "state", label: "Status", cell: row => badge(row.state) },
  { key: "id", label: "Capture", kind: "capture", cell: row => row.folder ? opener(row, row.id) : row.id },
  { key: "faces", label: "Faces", kind: "number", cell: row => decimal(row.faces, 0) },
  { key: "psnr_db", label: "PSNR, dB", kind: "number", cell: row => decimal(row.psnr_db, 1) },
  { key: "seconds", label: "Seconds", kind: "number", cell: row => decimal(row.seconds, 1) },
  { key: "gpu_seconds", label: "GPU seconds", kind: "number", cell: row => decimal(row.gpu_seconds, 2) },
  { key: "engine", label: "Engine", cell: row => row.engine ?? "" },
  { key: "reason", label: "Reason", kind: "reason", cell: row => foldable(row.reason) },
];

const at = id => document.getElementById(id);
const { rows, reasons } = JSON.parse(at("data").textContent);
const columns = COLUMNS.filter(({ key }) => rows.some(row => !missing(row[key])));
const names = new Intl.Collator(undefined, { numeric: true });
const filter = { query: "", states: new Set(), reason: null };
let sorting = { key: null, descending: false };
let found = rows, previews = 0, firstRow = 0;

for (const [index, row] of rows.entries()) {
  row.index = index;
  row.text = [row.id, row.reason, row.engine, row.state].join("\n").toLowerCase();
}

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function missing(value) {
  return value === null || value === "";
}

function badge(state, text = state) {
  const made = element("span", { className: "badge" }, text);
  made.dataset.state = state;
  return made;
}

function opener(row, ...children) {
  return element("button", { type: "button", onclick: () => openViewer(row) }, ...children);
}

function foldable(reason) {
  const [first, ...more] = reason.split("\n");
  return more.length ? element("details", {}, element("summary", {}, first), element("p", {}, more.join("\n"))) : reason;
}

function decimal(value, digits) {
  return value === null ? "" : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

// ---- filters and sorting

function update() {
  const words = filter.query.toLowerCase().split(/\s+/);
  found = rows.filter(row => (!filter.states.size || filter.states.has(row.state))
    && (filter.reason === null || row.reasons.includes(filter.reason))
    && words.every(word => row.text.includes(word)));
  if (sorting.key) found.sort(compare);
  for (const button of document.querySelectorAll("#states button")) {
    button.setAttribute("aria-pressed", filter.states.has(button.dataset.state));
  }
  for (const [index, button] of document.querySelectorAll("#reasons button").entries()) {
    button.setAttribute("aria-pressed", filter.reason === index);
  }
  at("found").textContent = `${found.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
  at("reset").hidden = found.length === rows.length;
  drawGallery();
  drawTable(0);
}

function compare(one, other) {
  const [a, b] = [one[sorting.key], other[sorting.key]];
  if (missing(a) !== missing(b)) return missing(a) - missing(b); // last, whichever the direction
  const order = sorting.key === "state" ? STATES.indexOf(a) - STATES.indexOf(b)
    : typeof a === "number" ? a - b : names.compare(a, b);
  return (sorting.descending ? -order : order) || one.index - other.index;
}

function sortBy(key) {
  sorting = { key, descending: sorting.key === key && !sorting.descending };
  for (const [index, column] of columns.entries()) {
    const head = document.querySelector("thead tr").children[index];
    if (column.key === key) head.setAttribute("aria-sort", sorting.descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  }
  update();
}

function toggleState(state) {
  if (!filter.states.delete(state)) filter.states.add(state);
  update();
}

function toggleReason(index) {
  filter.reason = filter.reason === index ? null : index;
  update();
}

function reset() {
  filter.query = at("query").value = "";
  filter.states.clear();
  filter.reason = null;
  update();
}

// ---- gallery and table

function drawGallery() {
  document.querySelector("#gallery ul").replaceChildren();
  previews = 0;
  addPreviews();
}

function addPreviews() {
  const shown = found.filter(row => row.preview);
  const list = document.querySelector("#gallery ul");
  list.append(...shown.slice(previews, previews += GALLERY_STEP).map(row => {
    const picture = element("img", { loading: "lazy", decoding: "async", width: 400, height: 400, alt: "" });
    picture.src = row.folder + row.preview;
    const caption = element("div", {}, element("strong", { title: row.id }, row.id), badge(row.state));
    caption.dataset.state = row.state;
    return element("li", {}, opener(row, picture, caption));
  }));
  at("more").hidden = previews >= shown.length;
  at("more").textContent = `Show more (${Math.max(0, shown.length - previews).toLocaleString("en")})`;
  at("gallery").hidden = !shown.length;
}

function drawTable(first) {
  firstRow = first;
  const last = Math.min(first + TABLE_PAGE, found.length);
  document.querySelector("tbody").replaceChildren(...found.slice(first, last).map(row => element("tr", {},
    ...columns.map(column => element("td", { className: column.kind ?? "" }, column.cell(row))))));
  at("range").textContent = found.length ? `${first + 1}–${last} of ${found.length}` : "nothing matches";
  at("previous").disabled = first === 0;
  at("next").disabled = last === found.length;
}

function drawOnce() {
  for (const state of STATES) {
    const count = rows.filter(row => row.state === state).length;
    if (!count) continue;
    const share = element("span", { title: `${state}: ${count}` });
    share.style.flex = count;
    const button = element("button", { type: "button", onclick: () => toggleState(state) },
      badge(state, `${state} ${count.toLocaleString("en")}`));
    share.dataset.state = button.dataset.state = state;
    at("shares").append(share);
    at("states").append(button);
  }
  document.querySelector("#reasons ul").append(...reasons.map((reason, index) => element("li", {},
    element("button", { type: "button", onclick: () => toggleReason(index) },
      element("b", {}, reason.captures.toLocaleString("en")), badge(reason.state), element("span", {}, reason.text)))));
  at("reasons").hidden = !reasons.length;
  document.querySelector("thead tr").append(...columns.map(column => element("th", { className: column.kind ?? "", scope: "col" },
    element("button", { type: "button", onclick: () => sortBy(column.key) }, column.label))));
}

// ---- the 3D viewer

let viewerLoaded = null, opened = null, meshUrl = null;

function loadViewer() {
  viewerLoaded ??= new Promise((resolve, reject) => {
    const source = new Blob([JSON.parse(at("viewer").textContent)], { type: "text/javascript" });
    document.head.append(element("script", { src: URL.createObjectURL(source), onload: resolve, onerror: reject }));
  });
  return viewerLoaded;
}

function openViewer(row) {
  opened = row;
  at("viewer-title").textContent = row.id;
  at("viewer-title").title = row.id;
  at("facts").replaceChildren(badge(row.state), ...facts(row), element("a", { href: row.folder + "mesh.glb" }, "mesh.glb"),
    element("a", { href: row.folder + "report.json" }, "report.json"), element("p", {}, row.reason));
  at("viewer-previous").disabled = !neighbour(-1);
  at("viewer-next").disabled = !neighbour(1);
  if (!at("viewer-dialog").open) at("viewer-dialog").showModal();
  showMesh(row);
}

function facts(row) {
  const told = [["faces", row.faces, 0], ["s", row.seconds, 1], ["GPU s", row.gpu_seconds, 2], ["dB PSNR", row.psnr_db, 1]];
  return [row.engine ?? "", ...told.filter(([, value]) => value !== null)
    .map(([unit, value, digits]) => `${decimal(value, digits)} ${unit}`)].map(text => element("span", {}, text));
}

async function showMesh(row) {
  clearStage();
  const embedded = at(`mesh-${row.index}`);
  if (!embedded && location.protocol === "file:") return note(...servingHint());
  await loadViewer();
  if (opened !== row) return;
  if (embedded) {
    const bytes = Uint8Array.from(atob(embedded.textContent), character => character.charCodeAt(0));
    meshUrl = URL.createObjectURL(new Blob([bytes], { type: "model/gltf-binary" }));
  }
  const viewer = document.createElement("model-viewer");
  viewer.addEventListener("error", () => note(element("p", {}, `${row.folder}mesh.glb could not be shown: is it there?`)));
  const settings = { src: meshUrl ?? row.folder + "mesh.glb", alt: `The mesh of ${row.id}`, "camera-controls": "",
    "touch-action": "none", "shadow-intensity": "0.6", "tone-mapping": "neutral", "interaction-prompt": "none",
    ...(row.preview && { poster: row.folder + row.preview }) };
  for (const [name, value] of Object.entries(settings)) viewer.setAttribute(name, value);
  at("stage").append(viewer);
}

function clearStage() {
  at("stage").replaceChildren();
  if (meshUrl) URL.revokeObjectURL(meshUrl);
  meshUrl = null;
}

function note(...children) {
  at("stage").replaceChildren(element("div", { className: "note" }, ...children));
}

function servingHint() {
  const parts = decodeURIComponent(location.pathname).split("/");
  const output = parts.slice(0, -2).join("/") || "/";
  const quoted = `'${output.replaceAll("'", "'\\''")}'`;
  const url = `http://127.0.0.1:8000/${encodeURIComponent(parts.at(-2))}/`;
  return [element("p", {}, "These meshes are too large together to be in this page, and browsers let no page that was "
    + "opened from the disk read the files beside it. Serve the folder with"),
  element("code", {}, `python3 -m http.server --bind 127.0.0.1 --directory ${quoted} 8000`),
  element("p", {}, "and open ", element("a", { href: url }, url))];
}

function neighbour(step) {
  const meshes = found.filter(row => row.folder);
  const place = meshes.indexOf(opened);
  return place < 0 ? undefined : meshes[place + step];
}

at("query").oninput = event => { filter.query = event.target.value; update(); };
at("reset").onclick = reset;
at("more").onclick = addPreviews;
at("previous").onclick = () => drawTable(firstRow - TABLE_PAGE);
at("next").onclick = () => drawTable(firstRow + TABLE_PAGE);
at("viewer-previous").onclick = () => openViewer(neighbour(-1));
at("viewer-next").onclick = () => openViewer(neighbour(1));
at("viewer-close").onclick = () => at("viewer-dialog").close();
at("viewer-dialog").onclose = () => { opened = null; clearStage(); };
drawOnce();
update();
