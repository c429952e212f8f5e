"use strict";
// Sorts and filters a table of entries, and says how long ago its times are.
const table = document.getElementById("entries-table");
const body = table.tBodies[0];
const words = document.getElementById("words");
const state = document.getElementById("state");
const told = document.getElementById("told");

function filter() {
  const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of body.rows) {
    const text = row.textContent.toLowerCase();
    const fits = (state.value === "" || row.dataset.state === state.value)
      && wanted.every((word) => text.includes(word));
    row.hidden = !fits;
    shown += fits;
  }
  told.textContent = shown + " of " + body.rows.length + " entries";
}

function valueOf(row, column) {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
}

function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
}

// Cells without a value come last either way.
function sort(column, descending) {
  const rows = [...body.rows].map((row) => [valueOf(row, column), row]);
  const isEmpty = ([value]) => value === "" || Number.isNaN(value);
  rows.sort((a, b) => isEmpty(a) - isEmpty(b) || (descending ? -1 : 1) * compare(a[0], b[0]));
  body.append(...rows.map(([, row]) => row));
}

for (const button of table.tHead.querySelectorAll("button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const descending = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    sort(head.cellIndex, descending);
  });
}

const UNITS = [["year", 31557600], ["month", 2629800], ["day", 86400], ["hour", 3600], ["minute", 60]];
const format = new Intl.RelativeTimeFormat("en", { numeric: "always" });
for (const time of document.querySelectorAll("time")) {
  const passed = (Date.now() - Date.parse(time.dateTime)) / 1000;
  const found = UNITS.find(([, one]) => passed >= one);
  time.title = time.textContent;
  time.textContent = found ? format.format(-Math.floor(passed / found[1]), found[0]) : "just now";
}

document.getElementById("written").textContent = new Date(document.lastModified).toLocaleString();
words.addEventListener("input", filter);
state.addEventListener("change", filter);
const form = document.getElementById("filter");
form.addEventListener("submit", (event) => event.preventDefault());
form.hidden = false;
filter();
