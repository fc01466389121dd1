"use strict";
// Order of rows from the server -> a grid that draws only what is visible -> decisions, one request after the other.
(() => {
  const $ = (id) => document.getElementById(id);
  const token = document.querySelector("meta[name=token]").content;
  const app = $("app"), grid = $("grid"), filters = $("filters"), zoom = $("zoom"), picker = $("picker"), help = $("help");
  const STATES = { kept: "kept", changed: "changed", unknown: "unknown", excluded: "excluded" };
  const CAPTION = 30, GAP = 12, AHEAD = 1, PAGE = 150, MOST_CACHED = 4000, MOST_SELECTED = 5000;

  let order = [], total = 0; // rows in their order
  let at = 0, anchor = 0; // places in the order: the cursor, and where a range began
  let near = -1; // the row that others are compared with
  let session = null, classes = [], learning = {};
  let ranking = ""; // what the head was when the order was made
  let touched = false; // whether the person has moved or decided since the order was made
  const chosen = new Set(); // selected rows
  const items = new Map(); // row -> what is known about it
  const clocks = new Map(); // row -> when the server said so, by its count of writes
  const asked = new Set(); // rows that are being asked for
  const tiles = new Map(); // place -> element
  const idle = []; // elements to use again
  const jobs = []; // decisions that are not on the disk yet, first comes first
  const undone = []; // batches of ids that can be taken back
  let saved = 0, busy = false, made = 0;

  // ---- small helpers
  const make = (tag, properties = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in element) element[name] = value; else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  };
  const SVG = "http://www.w3.org/2000/svg";
  const draw = (tag, attributes, ...children) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const number = (value) => value.toLocaleString("en");
  const counted = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
  const percent = (value, digits = 1) => `${(100 * value).toFixed(digits)} %`;
  const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(100 * value).toFixed(1)}`;
  const say = (text) => { $("said").textContent = text; };
  const later = (work, wait) => {
    let timer = 0;
    return () => { clearTimeout(timer); timer = setTimeout(work, wait); };
  };

  // ---- requests
  // An answer that breaks off is an error, as if there had been none: what it would have said is asked for, or sent, again.
  const answerOf = async (answer) => {
    if (answer.ok) return answer.json();
    return answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
  };
  const ask = async (path) => {
    const answer = await fetch(path, { credentials: "same-origin" });
    const value = await answerOf(answer);
    if (!answer.ok) throw new Error(value.error);
    return value;
  };
  const send = async (path, body) => {
    const answer = await fetch(path, {
      method: "POST", credentials: "same-origin", body: JSON.stringify(body),
      headers: { "Content-Type": "application/json", "X-Review-Token": token },
    });
    return { refused: !answer.ok, value: await answerOf(answer) };
  };
  const trouble = (text, again = null) => {
    $("trouble").hidden = !text;
    $("trouble").firstElementChild.textContent = text;
    $("trouble").lastElementChild.hidden = !again;
    $("trouble").lastElementChild.onclick = again;
  };

  // ---- the order of rows; of several that were asked for, the last one is shown, whichever answer comes last
  let loads = 0;
  const load = async ({ keep = false } = {}) => {
    const query = new URLSearchParams();
    for (const [name, value] of new FormData(filters)) if (value) query.set(name, value);
    if (query.get("by") === "similar") query.set("near", near);
    const row = order[at], mine = ++loads;
    ranking = head();
    try {
      const found = await ask(`order?${query}`);
      if (mine !== loads) return;
      order = found.rows;
      total = found.total;
    } catch (error) {
      if (mine !== loads) return;
      trouble(`The images could not be listed: ${error.message}`, () => load());
      return;
    }
    trouble("");
    chosen.clear();
    at = keep ? Math.max(0, order.indexOf(row)) : 0;
    anchor = at;
    touched = false;
    $("again").classList.remove("fresh");
    $("empty").hidden = order.length > 0;
    $("empty").textContent = emptyText(query);
    $("count").textContent = total > order.length
      ? `the first ${number(order.length)} of ${counted(total, "image")}` : counted(total, "image");
    if (!keep) grid.scrollTop = 0;
    recycle();
    layout();
    if (keep) reveal();
  };
  const emptyText = (query) => {
    const filtered = [...query.keys()].some((name) => !["by", "near", "state"].includes(name));
    if (query.get("state") === "open" && !filtered) return "Every image has a decision. Choose another filter to look at them again.";
    return "No image matches these filters.";
  };
  const head = () => `${learning.trained}/${learning.ranked}`;

  // ---- geometry: all tiles have one size, so a place has a position and nothing needs to be measured
  let tile = 176, columns = 1, wide = 176, high = 206, seen = 0, offset = 0;
  const measure = () => {
    const width = grid.clientWidth, small = window.innerWidth < 700;
    tile = Number($("size").value);
    const gap = small ? 8 : GAP, edge = small ? 12 : 16;
    columns = Math.max(1, Math.floor((width - 2 * edge + gap) / (tile + gap)));
    if (small) columns = Math.max(2, columns);
    wide = Math.floor((width - 2 * edge - (columns - 1) * gap) / columns);
    high = Math.round(wide * 0.86) + CAPTION;
    offset = edge;
    seen = grid.clientHeight;
    measure.gap = gap;
  };
  const top = (place) => 4 + Math.floor(place / columns) * (high + measure.gap);

  const space = make("div", { id: "space" });
  space.setAttribute("role", "presentation");
  grid.append(space);

  const recycle = () => {
    for (const element of tiles.values()) retire(element);
    tiles.clear();
  };
  const retire = (element) => {
    element.hidden = true;
    element.firstChild.removeAttribute("src");
    element.firstChild.className = "";
    idle.push(element);
  };
  const layout = () => {
    measure();
    const rows = Math.ceil(order.length / columns);
    space.style.height = `${rows * (high + measure.gap) + 8}px`;
    const first = Math.max(0, Math.floor(grid.scrollTop / (high + measure.gap)) - AHEAD) * columns;
    const last = Math.min(order.length, (Math.ceil((grid.scrollTop + seen) / (high + measure.gap)) + AHEAD) * columns);
    for (const [place, element] of tiles) {
      if (place < first || place >= last) { retire(element); tiles.delete(place); }
    }
    for (let place = first; place < last; place += 1) {
      let element = tiles.get(place);
      if (!element) { element = fresh(place); tiles.set(place, element); }
      const style = element.style, x = offset + (place % columns) * (wide + measure.gap);
      style.width = `${wide}px`;
      style.height = `${high}px`;
      style.transform = `translate(${x}px, ${top(place)}px)`;
      paint(place);
    }
    while (idle.length > 60) idle.pop().remove();
    grid.setAttribute("aria-activedescendant", tiles.has(at) ? `t${at}` : "");
    if (!tiles.has(at)) grid.removeAttribute("aria-activedescendant");
    want();
  };
  const fresh = (place) => {
    let element = idle.pop();
    if (!element) {
      const image = make("img", { alt: "", decoding: "async", draggable: false });
      image.addEventListener("load", () => { image.className = "here"; });
      image.addEventListener("error", () => { if (image.getAttribute("src")) element.classList.add("gone"); });
      element = make("div", { className: "tile" }, image, make("span", { className: "cap" }));
      element.setAttribute("role", "option");
      space.append(element);
    }
    element.hidden = false;
    element.id = `t${place}`;
    element.dataset.place = place;
    element.classList.remove("gone");
    pictures();
    return element;
  };
  // Pictures are asked for once scrolling pauses, so that a long way costs no requests.
  const pictures = later(() => {
    for (const [place, element] of tiles) {
      const source = `picture/${order[place]}/small`;
      if (element.firstChild.getAttribute("src") !== source) element.firstChild.src = source;
    }
  }, 40);

  const paint = (place) => {
    const element = tiles.get(place), row = order[place];
    if (!element) return;
    const item = items.get(row);
    const waiting = jobs.find((job) => job.rows && job.rows.includes(row));
    element.classList.toggle("at", place === at);
    element.classList.toggle("saving", Boolean(waiting));
    element.setAttribute("aria-selected", String(chosen.has(row)));
    element.setAttribute("aria-posinset", place + 1);
    element.setAttribute("aria-setsize", order.length);
    const caption = element.lastChild;
    if (!item) {
      delete element.dataset.state;
      caption.textContent = "";
      delete caption.dataset.also;
      element.setAttribute("aria-label", `image ${place + 1}`);
      return;
    }
    if (item.state === "open") delete element.dataset.state; else element.dataset.state = item.state;
    caption.textContent = shownLabel(item);
    const other = item.predicted && item.predicted !== item.label;
    element.classList.toggle("other", Boolean(other) && item.state === "open");
    caption.dataset.also = !item.predicted ? "" : other ? `${Math.round(100 * item.confidence)} % ${item.predicted}` : `${Math.round(100 * item.confidence)} %`;
    caption.style.setProperty("--s", item.suspicion === null || item.suspicion === undefined ? "0%" : `${Math.round(100 * item.suspicion)}%`);
    element.setAttribute("aria-label", spoken(item, waiting));
    element.title = item.path;
  };
  const shownLabel = (item) => ["excluded", "unknown"].includes(item.state) ? item.state : item.label || "no label";
  const spoken = (item, waiting) => {
    const parts = [item.name, `label ${shownLabel(item)}`];
    if (item.state === "changed" && item.original) parts.push(`was ${item.original}`);
    else if (item.state === "kept") parts.push("kept");
    if (item.predicted) parts.push(`predicted ${item.predicted}, ${Math.round(100 * item.confidence)} percent`);
    if (item.suspicion !== null && item.suspicion !== undefined) parts.push(`suspicion ${item.suspicion.toFixed(2)}`);
    if (waiting) parts.push("not saved yet");
    return parts.join(", ");
  };
  const repaint = () => { for (const place of tiles.keys()) paint(place); };

  // ---- what is known about the visible rows
  const want = later(async () => {
    const places = [...tiles.keys(), at].filter((place) => place < order.length);
    const rows = [...new Set(places.map((place) => order[place]))].filter((row) => !items.has(row) && !asked.has(row));
    if (!rows.length) return;
    for (const row of rows) asked.add(row);
    try {
      for (let start = 0; start < rows.length; start += PAGE) {
        learn((await ask(`items?rows=${rows.slice(start, start + PAGE)}`)).items);
      }
    } catch { /* the stream of events says when the server is back, and asks again */ } finally {
      for (const row of rows) asked.delete(row);
    }
  }, 30);
  const learn = (list) => {
    if (items.size > MOST_CACHED) items.clear();
    for (const item of list) {
      if (item.clock < (clocks.get(item.row) ?? 0)) continue; // answers may overtake each other; the later state counts
      clocks.set(item.row, item.clock);
      items.set(item.row, item);
    }
    repaint();
    if (zoom.open && list.some((item) => item.row === order[at])) showFacts();
  };
  const refresh = (rows = null) => { // what is known may have changed
    if (rows) for (const row of rows) items.delete(row); else items.clear();
    want();
  };

  // ---- moving and selecting
  const go = (place, { extend = false } = {}) => {
    if (!order.length) return;
    const before = at;
    at = Math.max(0, Math.min(order.length - 1, place));
    touched = true;
    if (extend) {
      chosen.clear();
      const low = Math.min(anchor, at), high = Math.max(anchor, at);
      for (let k = low; k <= high && chosen.size < MOST_SELECTED; k += 1) chosen.add(order[k]);
    } else anchor = at;
    reveal();
    layout();
    paint(before);
    showChosen();
    if (zoom.open) showZoom();
  };
  const reveal = () => {
    const start = top(at) - 4, end = start + high + 12;
    if (start < grid.scrollTop) grid.scrollTop = start;
    else if (end > grid.scrollTop + grid.clientHeight) grid.scrollTop = end - grid.clientHeight;
  };
  const toggle = (place) => {
    const row = order[place];
    if (row === undefined) return;
    if (!chosen.delete(row) && chosen.size < MOST_SELECTED) chosen.add(row);
    paint(place);
    showChosen();
  };
  const none = () => { chosen.clear(); anchor = at; repaint(); showChosen(); };
  const all = () => { for (const row of order.slice(0, MOST_SELECTED)) chosen.add(row); repaint(); showChosen(); };
  const showChosen = () => {
    $("chosen").textContent = chosen.size ? `${number(chosen.size)} selected` : "";
  };

  // ---- deciding: an image shows its decision at once, and a sign until it is on the disk
  const decide = (value, name = value) => { // the value is that of the file, the name that of the class
    const rows = chosen.size ? [...chosen] : order[at] === undefined ? [] : [order[at]];
    if (!rows.length) return;
    const one = rows.length === 1;
    touched = true;
    jobs.push({ rows, value, name });
    for (const row of rows) {
      const item = items.get(row);
      if (!item) continue;
      if (value === "unknown" || value === "exclude") {
        item.label = "";
        item.state = value === "unknown" ? "unknown" : "excluded";
      } else if (value || (item.state === "open" && item.label)) {
        item.label = name || item.label;
        item.state = item.label === item.original ? "kept" : "changed";
      }
    }
    chosen.clear();
    showChosen();
    repaint();
    if (one && at < order.length - 1) go(at + 1);
    else if (zoom.open) showZoom();
    pump();
  };
  const pump = async () => {
    showSaved();
    if (busy || !jobs.length) return;
    busy = true;
    const job = jobs[0];
    try {
      const batch = job.undo ? undone.at(-1) : null;
      if (job.undo && !batch) {
        jobs.shift();
        say("There is nothing to take back.");
      } else {
        const { refused, value } = await send(job.undo ? "undo" : "decide", job.undo ? { batch } : { rows: job.rows, value: job.value });
        jobs.shift();
        if (job.undo) undone.pop();
        if (refused) {
          trouble(`Not saved: ${value.error}`);
          say(`Not saved: ${value.error}`);
          if (job.rows) refresh(job.rows);
        } else done(job, value);
      }
      busy = false;
    } catch {
      silent();
      showSaved();
      setTimeout(retry, 2000);
      return;
    }
    repaint();
    pump();
  };
  const retry = () => { busy = false; pump(); };
  const silent = () => trouble(jobs.length
    ? `The server does not answer. ${counted(jobs.length, "decision")} not saved; they are sent as soon as it is back.`
    : "The server does not answer. Start it again, and open the link that it prints.", retry);
  const done = (job, value) => {
    saved += job.undo ? 0 : value.saved;
    made += value.saved;
    trouble("");
    if (!job.undo && value.batch.length) undone.push(value.batch);
    showCounts(value.counts);
    learn(value.items);
    const name = value.items.length === 1 ? value.items[0].name : counted(value.rows.length, "image");
    const what = job.undo ? "taken back" : job.value === "exclude" ? "excluded" : job.name || "kept";
    say(`${name}: ${what}. Saved.`);
    if (job.undo && value.items.length) {
      const place = order.indexOf(value.items[0].row);
      if (place >= 0) go(place);
    }
  };
  const showSaved = () => {
    const line = $("saved");
    const text = jobs.length ? `Saving ${counted(jobs.length, "decision")}` : made ? `All decisions saved in ${session.file}` : `Decisions go to ${session.file}`;
    if (jobs.length) line.dataset.busy = "yes"; else delete line.dataset.busy;
    line.dataset.saved = saved;
    line.firstElementChild.textContent = text;
    line.lastElementChild.textContent = jobs.length ? `Saving ${number(jobs.length)}` : "Saved";
    line.title = session.file;
    $("undo").disabled = !undone.length && !jobs.length;
  };
  const undo = () => { jobs.push({ undo: true }); pump(); };

  // ---- keys
  const giveClass = (k) => { if (k < classes.length) decide(classes[k].value, classes[k].name); };
  const rowsSeen = () => Math.max(1, Math.floor(seen / (high + measure.gap))) * columns;
  const moves = {
    ArrowLeft: () => at - 1, ArrowRight: () => at + 1, ArrowUp: () => at - columns, ArrowDown: () => at + columns,
    Home: () => 0, End: () => order.length - 1, PageUp: () => at - rowsSeen(), PageDown: () => at + rowsSeen(),
  };
  const similar = () => {
    if (order[at] === undefined) return;
    near = order[at];
    filters.by.querySelector("[value=similar]").hidden = false;
    filters.by.value = "similar";
    filters.state.value = "";
    if (zoom.open) zoom.close();
    load();
    say("Similar images first.");
  };
  const actions = {
    k: () => decide(""), u: () => decide("unknown"), x: () => decide("exclude"), z: undo, c: () => openPicker(), s: similar,
    r: () => load({ keep: false }), "/": () => filters.text.focus(), "?": () => help.showModal(),
    "+": () => resize(16), "=": () => resize(16), "-": () => resize(-16),
    " ": () => toggle(at), Enter: () => { if (zoom.open) zoom.close(); else openZoom(); }, Escape: none,
    left: () => go(at - 1), right: () => go(at + 1), close: () => document.querySelector("dialog[open]")?.close(), similar,
  };
  const press = (event) => {
    if (event.altKey || event.metaKey || (event.ctrlKey && event.key !== "a")) return;
    if (event.ctrlKey) { event.preventDefault(); all(); return; }
    let key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (zoom.open && (key === "ArrowUp" || key === "ArrowDown")) key = key === "ArrowUp" ? "ArrowLeft" : "ArrowRight";
    if (key in moves) go(moves[key](), { extend: event.shiftKey && !zoom.open });
    else if (/^[1-9]$/.test(key)) giveClass(Number(key) - 1);
    else if (key === "Escape" && zoom.open) return;
    else if (Object.hasOwn(actions, key) && key.length <= 6 && !["left", "right", "close"].includes(key)) actions[key]();
    else return;
    event.preventDefault();
  };
  grid.addEventListener("keydown", press);
  zoom.addEventListener("keydown", (event) => {
    if (event.target.tagName === "BUTTON" && [" ", "Enter"].includes(event.key)) return;
    press(event);
  });
  document.addEventListener("keydown", (event) => { // from the rest of the page, "/" and "?" work as well
    if (event.defaultPrevented || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.target.closest("input, select, dialog")) return;
    if (event.key === "/" || event.key === "?") { event.preventDefault(); actions[event.key](); }
    if (event.key === "z" && !grid.contains(event.target)) { event.preventDefault(); undo(); }
  });

  // ---- mouse and touch
  grid.addEventListener("click", (event) => {
    const element = event.target.closest(".tile");
    grid.focus({ preventScroll: true });
    if (!element) return;
    const place = Number(element.dataset.place);
    if (event.shiftKey) go(place, { extend: true });
    else if (event.ctrlKey || event.metaKey) { go(place); toggle(place); }
    else if (place === at && !chosen.size && touched) openZoom();
    else { chosen.clear(); go(place); repaint(); }
  });
  grid.addEventListener("dblclick", (event) => { if (event.target.closest(".tile") && !zoom.open) openZoom(); });
  let waiting = false;
  grid.addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; layout(); });
  }, { passive: true });
  new ResizeObserver(() => { layout(); }).observe(grid);
  const resize = (by) => { $("size").value = Number($("size").value) + by; rescale(); };
  const rescale = () => { layout(); reveal(); layout(); };
  $("size").addEventListener("input", rescale);

  for (const button of document.querySelectorAll("[data-do]")) button.addEventListener("click", () => actions[button.dataset.do]());
  $("undo").addEventListener("click", () => { undo(); });
  $("show-help").addEventListener("click", () => help.showModal());
  for (const [button, name] of [["show-filters", "with-filters"], ["show-panel", "with-panel"]]) {
    $(button).addEventListener("click", () => {
      const open = app.classList.toggle(name);
      $(button).setAttribute("aria-expanded", String(open));
      layout();
    });
  }
  filters.addEventListener("submit", (event) => { event.preventDefault(); });
  filters.addEventListener("change", (event) => { if (event.target.name) load(); });
  filters.text.addEventListener("input", later(() => load(), 180));
  filters.text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === "Escape") { event.preventDefault(); grid.focus(); }
  });
  $("again").addEventListener("click", () => { load(); grid.focus(); });
  window.addEventListener("beforeunload", (event) => { if (jobs.length) event.preventDefault(); });

  // ---- one image, large
  const openZoom = () => {
    if (order[at] === undefined) return;
    zoom.showModal();
    showZoom();
  };
  const showZoom = async () => {
    const row = order[at];
    $("large").src = `picture/${row}/large`;
    showFacts();
    const detail = await ask(`detail/${row}`).catch(() => null);
    if (!detail || order[at] !== row) return;
    const probable = detail.probable || [];
    $("zoom-head").textContent = !probable.length ? "" : detail.unseen ? "A head that has not seen it finds" : "The head, which was trained on it, finds";
    $("probable").replaceChildren(...probable.map(({ name, p }) => {
      const bar = make("i");
      bar.style.setProperty("--p", `${100 * p}%`);
      return make("li", {}, make("span", { textContent: name, title: name }), make("b", { textContent: percent(p) }), bar);
    }));
  };
  const showFacts = () => {
    const item = items.get(order[at]);
    if (!item) { $("zoom-name").textContent = ""; $("zoom-facts").replaceChildren(); return; }
    $("zoom-name").textContent = item.name;
    $("large").alt = spoken(item, false);
    const facts = [["Label", shownLabel(item)]];
    if (item.original !== item.label) facts.push(["In the store", item.original || "no label"]);
    facts.push(["Decision", item.state === "open" ? "none yet" : item.by ? `${item.state}, by ${item.by}` : item.state]);
    if (item.suspicion !== null && item.suspicion !== undefined) facts.push(["Suspicion", item.suspicion.toFixed(3)]);
    facts.push(["Split", item.split]);
    if (item.group) facts.push(["Group", item.group]);
    facts.push(["Size", `${item.width} × ${item.height}`], ["Path", item.path], ["Place", `${number(at + 1)} of ${number(order.length)}`]);
    $("zoom-facts").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]));
  };
  zoom.addEventListener("close", () => { $("large").removeAttribute("src"); grid.focus(); });
  help.addEventListener("close", () => grid.focus());

  // ---- any class
  let offered = [], picked = 0;
  const openPicker = () => { $("wanted").value = ""; picker.showModal(); offer(); };
  const offer = () => {
    const text = $("wanted").value.trim(), low = text.toLowerCase();
    offered = classes.map((one, k) => ({ name: one.name, value: one.value, key: k < 9 ? String(k + 1) : "" })).filter((one) => one.name.toLowerCase().includes(low));
    offered.sort((a, b) => b.name.toLowerCase().startsWith(low) - a.name.toLowerCase().startsWith(low));
    offered = offered.slice(0, 50);
    if (text && !classes.some((one) => one.name === text) && !["unknown", "exclude"].includes(text)) offered.push({ name: text, value: text, key: "", fresh: true });
    picked = 0;
    $("found").replaceChildren(...offered.map((one, k) => {
      const line = make("div", { id: `f${k}` }, one.fresh ? `New class “${one.name}”` : one.name, ...(one.key ? [make("kbd", { textContent: one.key })] : []));
      line.setAttribute("role", "option");
      line.addEventListener("click", () => { picked = k; pick(); });
      return line;
    }));
    mark();
  };
  const mark = () => {
    [...$("found").children].forEach((line, k) => {
      line.setAttribute("aria-selected", String(k === picked));
      if (k === picked) line.scrollIntoView({ block: "nearest" });
    });
    if (offered.length) $("wanted").setAttribute("aria-activedescendant", `f${picked}`);
    else $("wanted").removeAttribute("aria-activedescendant");
  };
  const pick = () => {
    const one = offered[picked];
    picker.close();
    if (one) decide(one.value, one.name);
  };
  $("wanted").addEventListener("input", offer);
  picker.addEventListener("keydown", (event) => {
    if (event.key === "Enter") { event.preventDefault(); pick(); }
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step && offered.length) { event.preventDefault(); picked = (picked + step + offered.length) % offered.length; mark(); }
  });
  picker.addEventListener("close", () => { if (!zoom.open) grid.focus(); });

  // ---- counts, and the classes that can be given
  const choice = (key, text, count, act) => {
    const button = make("button", { type: "button" }, make("kbd", { textContent: key }), text);
    if (count !== null) button.append(make("span", { className: "n", textContent: number(count) }));
    button.addEventListener("click", () => { act(); grid.focus({ preventScroll: true }); });
    return button;
  };
  const showCounts = (counts) => {
    const names = counts.classes.map((one) => one.name).join("\n");
    const changed = names !== classes.map((one) => one.name).join("\n");
    classes = counts.classes;
    if (changed) {
      $("given").replaceChildren(
        ...classes.slice(0, 9).map((one, k) => choice(String(k + 1), one.name, one.count, () => giveClass(k))),
      );
      $("acts").replaceChildren(choice("c", "Class", null, openPicker), choice("k", "Keep", null, actions.k), choice("u", "Unknown", null, actions.u), choice("x", "Exclude", null, actions.x));
      for (const select of [filters.label, filters.predicted]) {
        const value = select.value;
        select.replaceChildren(make("option", { value: "", textContent: "Any" }), ...classes.map((one) => make("option", { value: one.name, textContent: one.name })));
        select.value = value;
      }
    } else {
      [...$("choices").querySelectorAll(".n")].forEach((count, k) => { count.textContent = number(classes[k].count); });
    }
    const whole = Object.values(counts.states).reduce((a, b) => a + b, 0) || 1;
    const parts = Object.keys(STATES).filter((name) => counts.states[name]);
    $("bar").replaceChildren(...parts.map((name) => {
      const part = make("span", { className: `of-${name}` });
      part.style.width = `${100 * counts.states[name] / whole}%`;
      return part;
    }));
    const left = counts.states.open;
    $("states").replaceChildren(...[...Object.keys(STATES), "left"].flatMap((name) => [
      make("dt", { className: `of-${name}`, textContent: name }), make("dd", { textContent: number(name === "left" ? left : counts.states[name]) }),
    ]));
  };

  // ---- what the head has learned
  const showLearning = (said) => {
    const before = head();
    learning = said;
    const chip = $("learning");
    chip.dataset.status = said.status;
    chip.dataset.trained = said.trained;
    chip.textContent = said.status === "learning" ? "learning" : said.status === "ready" ? `learned in ${said.seconds.toFixed(1)} s` : "no head yet";
    $("message").textContent = said.status === "impossible" ? sentence(said.message) : "";
    const shown = [["corrected", "Corrected labels"], ["original", "Original labels"]].filter(([name]) => said[name]);
    $("changes").replaceChildren(...shown.map(([name, title]) => change(said[name], title)));
    if (!shown.length && said.status === "ready") $("message").textContent = "There are no labelled validation images to compare on.";
    const curve = said.curve.filter((point) => point.corrected !== null);
    $("curve-box").hidden = curve.length < 2;
    if (curve.length > 1) $("curve").replaceChildren(curveOf(curve));
    $("flips-box").hidden = !said.flipped;
    $("flips-title").textContent = `${counted(said.flipped, "prediction")} flipped`;
    $("flips").replaceChildren(...said.flips.slice(0, 8).map((row) => {
      const button = make("button", { type: "button" }, make("img", { src: `picture/${row}/small`, alt: "" }));
      button.setAttribute("aria-label", `Look at flipped image ${row}`);
      button.addEventListener("click", async () => { await showFlipped(row); openZoom(); });
      return button;
    }));
    if (before !== head()) {
      refresh();
      const byHead = ["suspicion", "uncertainty"].includes(filters.by.value);
      if (byHead && said.status === "ready" && said.ranked && ranking !== head()) {
        if (!touched) load(); else $("again").classList.add("fresh");
      }
    }
  };
  const sentence = (text) => text ? `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}` : "";
  const change = (one, title) => {
    const by = one.after - one.before, direction = by > 0 ? "up" : by < 0 ? "down" : "";
    const [low, high] = one.interval;
    return make("div", { className: "change" },
      make("h3", {}, title, make("span", { textContent: counted(one.n, "validation image") })),
      make("p", { className: "figures" },
        make("span", { className: "from", textContent: `${percent(one.before)} →` }), make("span", { textContent: percent(one.after) }),
        make("span", { className: `by ${direction}`, textContent: `${signed(by)} points` })),
      intervalOf(by, low, high),
      make("p", { className: "muted", textContent: `95 %: ${signed(low)} to ${signed(high)} · ${number(one.gained)} better, ${number(one.lost)} worse` }));
  };
  const intervalOf = (value, low, high) => {
    const most = Math.max(0.01, Math.abs(low), Math.abs(high)) * 1.1, x = (v) => 150 + 145 * v / most;
    return draw("svg", { viewBox: "0 0 300 16", "aria-hidden": "true" },
      draw("line", { class: "axis", x1: 0, x2: 300, y1: 8, y2: 8 }), draw("line", { class: "zero", x1: 150, x2: 150, y1: 0, y2: 16 }),
      draw("line", { class: "reach", x1: x(low), x2: x(high), y1: 8, y2: 8 }), draw("circle", { class: "dot", cx: x(value), cy: 8, r: 4 }));
  };
  const curveOf = (points) => {
    const values = points.flatMap((one) => [one.original, one.corrected]).filter((one) => one !== null);
    const last = points.at(-1), most = Math.max(1, last.decisions);
    let low = Math.min(...values), high = Math.max(...values);
    const room = Math.max(0.005, (high - low) * 0.15);
    low = Math.max(0, low - room);
    high = Math.min(1, high + room);
    const x = (one) => 44 + 244 * one.decisions / most, y = (value) => 122 - 112 * (value - low) / (high - low || 1);
    const line = (name) => draw("polyline", { class: `line-${name}`, points: points.map((one) => `${x(one).toFixed(1)},${y(one[name]).toFixed(1)}`).join(" ") });
    const dot = (name) => draw("circle", { class: `dot-${name}`, cx: x(last), cy: y(last[name]), r: 3.5 });
    const text = (content, attributes) => draw("text", attributes, content);
    const title = `Accuracy on corrected labels ${percent(points[0].corrected)} before, ${percent(last.corrected)} after ${counted(last.decisions, "decision")}`;
    return draw("svg", { viewBox: "0 0 300 142", role: "img", "aria-label": title },
      ...[low, (low + high) / 2, high].flatMap((value) => [
        draw("line", { class: "axis", x1: 44, x2: 288, y1: y(value), y2: y(value) }),
        text(percent(value), { x: 39, y: y(value) + 4, "text-anchor": "end" })]),
      text("0", { x: 44, y: 139, "text-anchor": "middle" }), text(number(most), { x: 288, y: 139, "text-anchor": "middle" }),
      line("original"), line("corrected"), dot("original"), dot("corrected"));
  };
  const showFlipped = async (row = null) => {
    filters.state.value = "flipped";
    app.classList.remove("with-panel");
    $("show-panel").setAttribute("aria-expanded", "false");
    await load();
    if (row !== null) go(order.indexOf(row));
    grid.focus();
  };
  $("flips-all").addEventListener("click", () => showFlipped());

  // ---- the stream of events; when it opens again, everything is asked for anew, so nothing is missed
  const listen = () => {
    const events = new EventSource("events");
    let lost = false;
    events.addEventListener("learning", (event) => {
      if (lost) { lost = false; trouble(""); refresh(); retry(); }
      showLearning(JSON.parse(event.data));
    });
    events.addEventListener("decided", (event) => {
      const { items: heard, more, counts } = JSON.parse(event.data);
      showCounts(counts);
      learn(heard);
      if (more) refresh();
    });
    events.addEventListener("error", () => {
      if (!lost) silent();
      lost = true;
    });
  };

  const start = async () => {
    app.hidden = false;
    try {
      session = await ask("state");
    } catch (error) {
      trouble(`The page could not be loaded: ${error.message}`, () => location.reload());
      return;
    }
    undone.push(...session.undo);
    for (const [select, list] of [[filters.split, session.splits], [filters.group, session.groups]]) {
      select.append(...list.map((one) => make("option", { value: one.name, textContent: `${one.name || "none"} (${number(one.count)})` })));
    }
    $("groups").hidden = !session.groups.length;
    const notes = [];
    if (session.hidden) notes.push(`${counted(session.hidden, "test image")} not shown, so that the test stays a test.`);
    if (session.missing) notes.push(`No pictures: ${session.missing}.`);
    $("notes").textContent = notes.join(" ");
    if (session.missing) trouble(`No pictures can be shown: ${session.missing}. Give their place with --images.`);
    showCounts(session.counts);
    learning = session.learning;
    showLearning(session.learning);
    showSaved();
    await load();
    if (session.missing) trouble(`No pictures can be shown: ${session.missing}. Give their place with --images.`);
    grid.focus();
    listen();
  };
  start();
})();
