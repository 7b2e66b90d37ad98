"use strict";
// Sorting and filtering of the table of all rows, and copying of commands. Without it everything can be read all the same.
(() => {
  const all = document.getElementById("all-rows");
  const form = document.querySelector(".filters");

  function copyButtons() {
    for (const code of document.querySelectorAll("code.command")) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "copy";
      button.textContent = "copy";
      button.addEventListener("click", async () => {
        button.textContent = (await copied(code)) ? "copied" : "press Ctrl+C";
        setTimeout(() => { button.textContent = "copy"; }, 1500);
      });
      code.after(button);
    }
  }

  async function copied(code) {
    try {
      await navigator.clipboard.writeText(code.textContent);
      return true;
    } catch {
      getSelection().selectAllChildren(code); // no clipboard for this page: leave the text selected
      return false;
    }
  }

  function sortable() {
    const body = all.tBodies[0];
    const titles = [...all.tHead.rows[0].cells];
    for (const [column, title] of titles.entries()) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = title.textContent;
      title.replaceChildren(button);
      button.addEventListener("click", () => {
        const up = title.getAttribute("aria-sort") !== "ascending";
        for (const other of titles) other.removeAttribute("aria-sort");
        title.setAttribute("aria-sort", up ? "ascending" : "descending");
        const key = title.dataset.sort === "number" ? number : words;
        const rows = [...body.rows].map((row) => [key(row.cells[column]), row]);
        rows.sort(([a], [b]) => order(a, b, up));
        body.append(...rows.map(([, row]) => row));
      });
    }
  }

  const words = (cell) => cell.textContent;
  const number = (cell) => (cell.dataset.v === undefined ? null : Number(cell.dataset.v));

  function order(a, b, up) { // what has no number stays last
    if (a === null || b === null) return (a === null) - (b === null);
    const sign = typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
    return up ? sign : -sign;
  }

  function filter() {
    const wanted = form.querySelector("[data-find]").value.toLowerCase().split(/\s+/).filter(Boolean);
    const choices = [...form.querySelectorAll("select")].filter((select) => select.value);
    let shown = 0;
    for (const row of all.tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      const fits = choices.every((select) => row.dataset[select.dataset.column] === select.value) && wanted.every((word) => text.includes(word));
      row.hidden = !fits;
      shown += fits;
    }
    form.querySelector("output").textContent = `${shown} of ${all.tBodies[0].rows.length} rows`;
  }

  copyButtons();
  if (all && form) {
    sortable();
    form.hidden = false;
    form.addEventListener("input", filter);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(filter));
  }
})();
