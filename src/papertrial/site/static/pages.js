// Makes pages that work without it better: forms answer in place, search follows the typing, the board sorts at once.
"use strict";

const parse = (html) => new DOMParser().parseFromString(html, "text/html");
const told = document.getElementById("told");
let silence;

function tell(text) {
  told.textContent = text;
  clearTimeout(silence);
  silence = setTimeout(() => { told.textContent = ""; }, 6000);
}

// Put the part of another page with this id in place of ours; the focus stays where it was, if that is still there.
function swap(id, page) {
  const fresh = page.getElementById(id), held = document.getElementById(id);
  if (!fresh || !held) return false;
  const active = document.activeElement, inside = held.contains(active);
  const key = inside && (active.id || active.getAttribute("aria-label"));
  const place = inside ? [...held.querySelectorAll("button, a, input, textarea, summary")].indexOf(active) : -1;
  held.replaceWith(fresh);
  if (inside) {
    const same = [...fresh.querySelectorAll("button, a, input, textarea, summary")];
    (same.find((element) => key && (element.id || element.getAttribute("aria-label")) === key) || same[place] || same[0])?.focus();
  }
  prepare(fresh);
  return true;
}

// Forms with data-swap: sent in the background, and the named part of the page they lead to takes the place of ours.
async function send(form) {
  const buttons = form.querySelectorAll("button");
  buttons.forEach((button) => button.setAttribute("aria-disabled", "true"));
  try {
    const body = new URLSearchParams(new FormData(form));
    const answer = await fetch(form.action, { method: "POST", body, headers: { Accept: "text/html" } });
    const page = parse(await answer.text());
    const wrong = page.querySelector("#problem-message");
    if (wrong || !swap(form.dataset.swap, page)) tell(wrong ? wrong.textContent : "That did not work. Load the page again.");
  } catch {
    tell("The service cannot be reached. Nothing was changed.");
  } finally {
    buttons.forEach((button) => button.removeAttribute("aria-disabled"));
  }
}

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (!form.dataset.swap) return;
  event.preventDefault();
  if (!form.querySelector("button[aria-disabled]")) send(form);
});

// Forms with data-live: what is typed is looked up at once; the address of the page follows.
function live(form) {
  const id = form.dataset.live;
  let timer, running;
  const look = async () => {
    running?.abort();
    running = new AbortController();
    const wanted = new URLSearchParams([...new FormData(form)].filter(([, value]) => value !== ""));
    const address = `${form.getAttribute("action")}${wanted.size ? `?${wanted}` : ""}`;
    try {
      const answer = await fetch(address, { signal: running.signal, headers: { Accept: "text/html" } });
      const page = parse(await answer.text());
      if (!swap(id, page)) tell(page.querySelector("#problem-message")?.textContent || "That did not work.");
      history.replaceState(null, "", address);
      document.title = page.title;
    } catch (error) {
      if (error.name !== "AbortError") tell("The service cannot be reached.");
    }
  };
  form.addEventListener("input", (event) => {
    clearTimeout(timer);
    timer = setTimeout(look, event.target.type === "search" ? 180 : 0);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(timer);
    look();
  });
}

// The board: its rows are all here, so sorting and filtering need no answer from the service.
function board(form) {
  const table = document.getElementById(form.dataset.board), body = table.tBodies[0];
  const rows = [...body.rows], complete = location.search === "" || ![...new FormData(form)].some(([name, value]) => value && name !== "sort" && name !== "descending");
  if (!complete) { // only some rows were sent: let the service answer
    form.addEventListener("change", () => form.requestSubmit());
    return;
  }
  const total = rows.length, texts = new Map(rows.map((row) => [row, row.cells[0].textContent.toLowerCase()]));
  const order = {
    verdict: ["upheld", "contradicted", "undecided", "none"],
    state: ["fresh", "aged", "stale", "incomplete", "not yet on trial"],
  };
  const value = (row, key, column) => {
    if (key === "effect") return row.dataset.effect === undefined ? null : Number(row.dataset.effect === "inf" ? Infinity : row.dataset.effect === "-inf" ? -Infinity : row.dataset.effect);
    if (order[key]) return order[key].indexOf(row.dataset[key]);
    return row.cells[column].textContent.trim().toLowerCase();
  };
  const show = () => {
    const chosen = Object.fromEntries(new FormData(form)), words = chosen.q.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const fits = ["family", "verdict", "state"].every((name) => !chosen[name] || row.dataset[name] === chosen[name]) && words.every((word) => texts.get(row).includes(word));
      row.hidden = !fits;
      shown += fits;
    }
    document.getElementById("board-count").textContent = `${shown} of ${total} papers`;
    document.getElementById("board-empty").hidden = shown > 0;
    const wanted = new URLSearchParams([...new FormData(form)].filter(([, text]) => text !== ""));
    history.replaceState(null, "", `/verdicts?${wanted}`);
  };
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => { event.preventDefault(); show(); });
  table.tHead.addEventListener("click", (event) => {
    const heading = event.target.closest("th"), link = event.target.closest("a");
    if (!heading || !link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    const key = heading.dataset.key, sorted = heading.getAttribute("aria-sort");
    const descending = sorted ? sorted === "ascending" : key === "effect" || key === "published";
    const sign = descending ? -1 : 1;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const keyed = rows.map((row) => [value(row, key, heading.cellIndex), row.cells[0].textContent.trim().toLowerCase(), row]);
    keyed.sort(([a, t], [b, u]) => (a === null || b === null ? (a === null) - (b === null) : sign * ((a > b) - (a < b))) || (t > u) - (t < u));
    body.append(...keyed.map(([, , row]) => row));
    form.elements.sort.value = key;
    form.querySelector("[name=descending]")?.remove();
    if (descending) form.insertAdjacentHTML("afterbegin", '<input type="hidden" name="descending" value="true">');
    show();
  });
}

function prepare(root) {
  for (const button of root.querySelectorAll("[data-copy]")) {
    button.hidden = !navigator.clipboard;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
      tell("Copied.");
    });
  }
}

prepare(document);
document.querySelectorAll("form[data-live]").forEach(live);
document.querySelectorAll("form[data-board]").forEach(board);
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !event.target.closest("input, textarea, select")) {
    event.preventDefault();
    (document.getElementById("q") || document.getElementById("find")).focus();
  }
  if (event.key === "Escape") document.querySelectorAll("details.menu[open]").forEach((menu) => { menu.open = false; menu.querySelector("summary").focus(); });
});
document.addEventListener("click", (event) => {
  document.querySelectorAll("details.menu[open]").forEach((menu) => { if (!menu.contains(event.target)) menu.open = false; });
});
