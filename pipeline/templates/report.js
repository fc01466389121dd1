"use strict";
(() => {
  document.documentElement.classList.add("js"); // shows the parts that need this script
  const announce = document.getElementById("announce");

  // Tables: the buttons in the headings sort them; a button below a long table shows or hides its later rows.
  const cellValue = (row, column) => row.cells[column].dataset.v ?? "";
  const compare = (a, b, numeric) => {
    if (a === b) return 0;
    if (a === "") return 1;
    if (b === "") return -1;
    return numeric ? a - b : a.localeCompare(b, undefined, { numeric: true });
  };
  const cut = (table) => {
    const limit = table.dataset.open ? Infinity : Number(table.dataset.limit);
    [...table.tBodies[0].rows].forEach((row, number) => { row.hidden = number >= limit; });
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      const button = heading.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const now = heading.getAttribute("aria-sort");
        const other = now === "ascending" ? "descending" : "ascending";
        const order = now === "none" ? heading.dataset.first : other;
        headings.forEach((cell) => cell.hasAttribute("aria-sort") && cell.setAttribute("aria-sort", "none"));
        heading.setAttribute("aria-sort", order);
        const numeric = heading.classList.contains("num");
        const sign = order === "ascending" ? 1 : -1;
        const rows = [...table.tBodies[0].rows];
        rows.sort((first, second) => {
          const a = cellValue(first, column);
          const b = cellValue(second, column);
          const found = compare(a, b, numeric);
          return a === "" || b === "" ? found : sign * found; // rows without a value always come last
        });
        table.tBodies[0].append(...rows);
        if (table.dataset.limit) cut(table);
        announce.textContent = `Sorted by ${button.textContent}, ${order}.`;
      });
    });
    const count = table.tBodies[0].rows.length;
    if (count > Number(table.dataset.limit)) {
      const more = document.createElement("button");
      const label = () => {
        more.textContent = table.dataset.open
          ? `Show the first ${table.dataset.limit}` : `Show all ${count.toLocaleString("en")} ${table.dataset.what}`;
        more.setAttribute("aria-expanded", String(Boolean(table.dataset.open)));
      };
      more.type = "button";
      more.className = "more";
      more.addEventListener("click", () => {
        if (table.dataset.open) delete table.dataset.open; else table.dataset.open = "yes";
        label();
        cut(table);
      });
      label();
      cut(table);
      table.parentElement.after(more);
    }
  }

  // Feature maps: a box describes the point nearest to the pointer or reached by arrow keys, and both maps mark it.
  for (const figure of document.querySelectorAll("figure.maps")) {
    const facts = JSON.parse(figure.querySelector("script").textContent);
    const tip = figure.querySelector(".tip");
    const picture = figure.querySelector(".tip-picture");
    const image = picture.querySelector("img");
    const text = figure.querySelector(".tip-text");
    const tile = Number(figure.dataset.tile);
    const across = Number(figure.dataset.across);
    const maps = [...figure.querySelectorAll("svg.map")].map((svg) => ({
      svg,
      cursor: svg.querySelector(".cursor"),
      points: [...svg.querySelectorAll("use")].map((use) => ({
        number: Number(use.dataset.i), x: Number(use.getAttribute("x")), y: Number(use.getAttribute("y")),
      })),
    }));
    let current = -1;
    const ofClasses = (fact) => {
      const label = facts.classes[fact.label];
      const said = fact.label === fact.predicted ? `✓ ${label}` : `✗ ${facts.classes[fact.predicted]}, is ${label}`;
      return `${said}\nconfidence ${fact.confidence.toFixed(3)}`;
    };
    const show = (number, from) => {
      current = number;
      const fact = facts.images[number];
      text.textContent = `${fact.said ?? ofClasses(fact)}\n${fact.file}`;
      picture.hidden = !image || fact.tile < 0;
      if (image && fact.tile >= 0) {
        image.alt = fact.file;
        image.style.left = `${-(fact.tile % across) * tile}px`;
        image.style.top = `${-Math.floor(fact.tile / across) * tile}px`;
      }
      tip.hidden = false;
      for (const map of maps) {
        const point = map.points.find((one) => one.number === number);
        map.cursor.setAttribute("cx", point.x);
        map.cursor.setAttribute("cy", point.y);
        map.cursor.setAttribute("visibility", "visible");
        if (map !== from) continue;
        const box = map.svg.getBoundingClientRect();
        const outer = figure.getBoundingClientRect();
        const scale = box.width / map.svg.viewBox.baseVal.width;
        const left = box.left - outer.left + point.x * scale;
        const top = box.top - outer.top + point.y * scale;
        const beside = left + 16 + tip.offsetWidth <= outer.width ? left + 16 : left - 16 - tip.offsetWidth;
        tip.style.left = `${Math.max(0, Math.min(beside, outer.width - tip.offsetWidth))}px`;
        tip.style.top = `${beside < 0 ? top + 16 : Math.max(0, top - tip.offsetHeight / 2)}px`;
      }
    };
    const hide = () => {
      tip.hidden = true;
      maps.forEach((map) => map.cursor.setAttribute("visibility", "hidden"));
    };
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    for (const map of maps) {
      const nearest = (x, y, allowed) => {
        let best = null;
        let least = Infinity;
        for (const point of map.points) {
          const distance = allowed(point.x - x, point.y - y);
          if (distance < least) { least = distance; best = point; }
        }
        return { best, least };
      };
      const point = (event) => {
        const box = map.svg.getBoundingClientRect();
        const scale = map.svg.viewBox.baseVal.width / box.width;
        const x = (event.clientX - box.left) * scale;
        const y = (event.clientY - box.top) * scale;
        const { best, least } = nearest(x, y, Math.hypot);
        if (least <= 18) show(best.number, map); else hide();
      };
      map.svg.addEventListener("pointermove", point);
      map.svg.addEventListener("pointerdown", point);
      map.svg.addEventListener("pointerleave", hide);
      map.svg.addEventListener("blur", hide);
      map.svg.addEventListener("focus", () => {
        if (map.svg.matches(":focus-visible")) show(current < 0 ? map.points[0].number : current, map);
      });
      map.svg.addEventListener("keydown", (event) => {
        if (event.key === "Escape") hide();
        const step = steps[event.key];
        if (!step) return;
        event.preventDefault();
        const here = map.points.find((one) => one.number === current) ?? map.points[0];
        // The distance sideways counts twice, so that a point ahead is preferred to one beside.
        const { best } = nearest(here.x, here.y, (dx, dy) => {
          const ahead = dx * step[0] + dy * step[1];
          const aside = Math.abs(dx * step[1]) + Math.abs(dy * step[0]);
          return ahead > 0 ? ahead + 2 * aside : Infinity;
        });
        show((best ?? here).number, map);
      });
    }
  }
})();
