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
    if (wrong) tell(wrong.textContent);
    else if (!answer.ok) tell("That did not work. Load the page again.");
    else if (!swap(form.dataset.swap, page)) location.assign(answer.url); // the part is gone, as from a list of votes
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

// The search box of every page: titles as you type. Arrow keys choose, Enter opens, Escape closes; without a choice Enter
// searches. The pattern is that of an ARIA combobox with a list.
function suggest(input) {
  const list = document.createElement("ul");
  list.id = "found-titles";
  list.className = "suggestions";
  list.setAttribute("role", "listbox");
  list.setAttribute("aria-label", "Papers found");
  list.hidden = true;
  input.after(list);
  for (const [name, value] of Object.entries({ role: "combobox", "aria-expanded": "false", "aria-controls": list.id, "aria-autocomplete": "list" })) input.setAttribute(name, value);
  let timer, running, chosen = -1;
  const choose = (place) => {
    const options = [...list.children], states = options.length + 1; // every option, and none of them
    chosen = ((place + 1 + states) % states) - 1;
    options.forEach((option, i) => option.setAttribute("aria-selected", String(i === chosen)));
    if (chosen < 0) input.removeAttribute("aria-activedescendant");
    else input.setAttribute("aria-activedescendant", options[chosen].id);
  };
  const close = () => {
    list.hidden = true;
    input.setAttribute("aria-expanded", "false");
    choose(-1);
  };
  const offer = (papers) => {
    list.replaceChildren(...papers.map(({ paper, title, papertrial }, i) => {
      const option = document.createElement("li"), verdict = papertrial.verdict;
      option.id = `found-title-${i}`;
      option.setAttribute("role", "option");
      option.dataset.address = `/papers/${paper.id}`;
      option.append(Object.assign(document.createElement("span"), { textContent: title }));
      if (verdict && papertrial.scale) option.append(Object.assign(document.createElement("span"), { className: `badge ${verdict}`, textContent: `${verdict} at ${papertrial.scale}` }));
      return option;
    }));
    list.hidden = !papers.length;
    input.setAttribute("aria-expanded", String(papers.length > 0));
    choose(-1);
  };
  const look = async () => {
    running?.abort();
    const words = input.value.trim();
    if (words.length < 2) return close();
    running = new AbortController();
    try {
      const answer = await fetch(`/api/papers/search?${new URLSearchParams({ q: words, limit: 6 })}`, { signal: running.signal });
      if (answer.ok && document.activeElement === input) offer(await answer.json());
    } catch { /* the form still searches */ }
  };
  input.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(look, 180); });
  input.addEventListener("blur", () => setTimeout(close, 150));
  input.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !list.hidden) { event.preventDefault(); close(); }
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      if (list.hidden) return;
      event.preventDefault();
      choose(event.key === "ArrowDown" ? chosen + 1 : chosen - 1);
    }
    if (event.key === "Enter" && chosen >= 0) {
      event.preventDefault();
      location.assign(list.children[chosen].dataset.address);
    }
  });
  list.addEventListener("mousedown", (event) => {
    const option = event.target.closest("[role=option]");
    if (!option) return;
    event.preventDefault();
    location.assign(option.dataset.address);
  });
}

// The board: its rows are all here, so sorting and filtering need no answer from the service.
function board(form) {
  const filters = ["q", "family", "verdict", "state"];
  if (filters.some((name) => form.elements[name].value)) { // only some rows were sent: let the service answer
    form.addEventListener("change", () => form.requestSubmit());
    return;
  }
  const table = document.getElementById(form.dataset.board), body = table.tBodies[0], rows = [...body.rows];
  const texts = new Map(rows.map((row) => [row, row.cells[0].textContent.toLowerCase()]));
  const titles = new Map(rows.map((row) => [row, row.querySelector(".title").textContent.toLowerCase()]));
  const order = {
    verdict: ["upheld", "contradicted", "undecided", "none"],
    state: ["fresh", "aged", "stale", "incomplete", "not yet on trial"],
  };
  const values = {
    title: (row) => titles.get(row),
    family: (row) => row.dataset.family,
    published: (row) => row.dataset.published,
    effect: ({ dataset: { effect } }) => effect === undefined ? null : Number(effect.replace("inf", "Infinity")),
    verdict: (row) => order.verdict.indexOf(row.dataset.verdict),
    state: (row) => order.state.indexOf(row.dataset.state),
  };
  const { sort } = form.elements;
  let descending = table.querySelector("[aria-sort]")?.getAttribute("aria-sort") === "descending";
  const show = () => {
    const chosen = Object.fromEntries(new FormData(form)), words = chosen.q.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      row.hidden = !(["family", "verdict", "state"].every((name) => !chosen[name] || row.dataset[name] === chosen[name]) && words.every((word) => texts.get(row).includes(word)));
      shown += !row.hidden;
    }
    document.getElementById("board-count").textContent = `${shown} of ${rows.length} papers`;
    document.getElementById("board-empty").hidden = shown > 0;
    const wanted = new URLSearchParams(Object.entries(chosen).filter(([, text]) => text !== ""));
    wanted.set("descending", descending);
    history.replaceState(null, "", `/verdicts?${wanted}`);
  };
  const arrange = () => {
    const sign = descending ? -1 : 1, keyed = rows.map((row) => [values[sort.value](row), titles.get(row), row]);
    keyed.sort(([a, t], [b, u]) => (a === null || b === null ? (a === null) - (b === null) : sign * ((a > b) - (a < b))) || (t > u) - (t < u));
    body.append(...keyed.map(([, , row]) => row));
    for (const heading of table.tHead.rows[0].cells) {
      if (heading.dataset.key === sort.value) heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else heading.removeAttribute("aria-sort");
    }
  };
  form.addEventListener("input", (event) => {
    if (event.target === sort) {
      descending = sort.selectedOptions[0].dataset.first === "descending";
      arrange();
    }
    show();
  });
  form.addEventListener("submit", (event) => { event.preventDefault(); show(); });
  table.tHead.addEventListener("click", (event) => {
    const heading = event.target.closest("th"), link = event.target.closest("a");
    if (!heading || !link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    const { key } = heading.dataset, same = sort.value === key;
    sort.value = key;
    descending = same ? !descending : sort.selectedOptions[0].dataset.first === "descending";
    arrange();
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
document.querySelector(".sections [aria-current]")?.scrollIntoView({ block: "nearest", inline: "nearest" });
suggest(document.getElementById("find"));
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
