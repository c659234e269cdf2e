'use strict';
// Cells are sorted by data-v where they have one, as numbers; otherwise by their text.
const table = document.getElementById('tensors');
const body = table.tBodies[0];
const rows = Array.from(body.rows);
const filter = document.getElementById('filter');
const shown = document.getElementById('shown');

filter.addEventListener('input', () => {
  const wanted = filter.value.toLowerCase();
  let count = 0;
  for (const row of rows) {
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
    count += row.hidden ? 0 : 1;
  }
  shown.textContent = count + ' of ' + rows.length;
});

const heads = Array.from(table.tHead.rows[0].cells);
heads.forEach((head, column) => head.addEventListener('click', () => {
  const up = head.getAttribute('aria-sort') !== 'ascending';
  for (const other of heads) other.setAttribute('aria-sort', 'none');
  head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const compare = (a, b) => {
    const x = a.cells[column], y = b.cells[column];
    const by = x.dataset.v === undefined
      ? x.textContent.localeCompare(y.textContent, undefined, { numeric: true })
      : Number(x.dataset.v) - Number(y.dataset.v);
    return up ? by : -by;
  };
  rows.sort(compare);
  body.append(...rows);
}));
