// Tables that sort; models that are shown, selected and filtered in the table
// and all pictures at once. Without scripts the page is static.
(() => {
  const number = (text) => Number(text.replace(/^[x+]|,(?=\d{3})| .*/g, ''));
  const order = (all) => all.every((x) => !isNaN(number(x)))
    ? (a, b) => number(a) - number(b)
    : (a, b) => a.localeCompare(b, undefined, {numeric: true});
  const texts = (row) => [...row.cells].map((cell) => cell.textContent);

  for (const head of document.querySelectorAll('thead th')) {
    head.tabIndex = 0;
    head.addEventListener('click', () => {
      const body = head.closest('table').tBodies[0];
      const k = head.cellIndex;
      const rows = [...body.rows].map((row) => [texts(row)[k], row]);
      const compare = order(rows.map(([text]) => text));
      const isUp = head.getAttribute('aria-sort') === 'descending';
      rows.sort(([a], [b]) =>  // What is empty comes last.
        (a === '') - (b === '') || (isUp ? 1 : -1) * compare(a, b));
      for (const x of head.parentNode.cells) x.removeAttribute('aria-sort');
      head.setAttribute('aria-sort', isUp ? 'ascending' : 'descending');
      body.append(...rows.map(([, row]) => row));
    });
  }
  document.addEventListener('keydown', (event) => {
    if (event.key === 'Enter') event.target.closest('th, tr')?.click();
  });

  const table = document.querySelector('table.models');
  if (!table) return;
  const heads = texts(table.tHead.rows[0]);
  const models = [...table.tBodies[0].rows];
  const cells = models.map(texts);
  const pictures = [...document.querySelectorAll('svg[data-points]')].map(
    (svg) => ({
      svg,
      layer: svg.appendChild(document.createElementNS(svg.namespaceURI, 'g')),
      points: JSON.parse(svg.dataset.points),  // Of each: model, x, y.
    }));
  // true, false, or undefined where a model has no such value: then it stays.
  let passes = [];
  let selected = -1;
  let hovered = -1;

  const draw = () => {
    const kinds = [  // In the order in which they are drawn.
      ['out', 5.5, (i) => passes[i] === false],
      ['in', 2.5, (i) => passes[i]],
      ['ring', 7, (i) => i === hovered],
      ['ring selected', 7, (i) => i === selected],
    ];
    for (const {svg, layer, points} of pictures) {
      layer.replaceChildren();
      for (const [name, r, isIt] of kinds) {
        for (const [, cx, cy] of points.filter(([i]) => isIt(i))) {
          const circle = document.createElementNS(svg.namespaceURI, 'circle');
          for (const [k, v] of Object.entries({cx, cy, r, class: name}))
            circle.setAttribute(k, v);
          layer.append(circle);
        }
      }
    }
    models.forEach((row, i) => { row.hidden = passes[i] === false; });
    const name = cells[selected]?.[0];
    for (const row of document.querySelectorAll('tbody tr')) {
      const text = row.cells[0].textContent;  // Of pairs: 'this and that'.
      row.classList.toggle('selected', models.includes(row)
        ? row === models[selected]
        : text === name || text.split(' and ').includes(name));
    }
  };

  const tip = document.body.appendChild(document.createElement('div'));
  tip.id = 'tip';
  tip.hidden = true;
  const hover = (i, {clientX, clientY}) => {
    tip.hidden = i < 0;
    if (i >= 0) {
      tip.replaceChildren(...cells[i].flatMap((text, k) => {
        const line = document.createElement(k ? 'div' : 'b');
        line.textContent = k ? `${heads[k]}: ${text}` : text;
        return text ? [line] : [];
      }));
      const {offsetWidth: width, offsetHeight: height} = tip;
      const isBelow = clientY + 14 + height < innerHeight;
      const x = Math.min(clientX + 14, innerWidth - width - 4);
      const y = isBelow ? clientY + 14 : clientY - 14 - height;
      tip.style.left = `${Math.max(4, x)}px`;
      tip.style.top = `${Math.max(4, y)}px`;
    }
    if (i !== hovered) { hovered = i; draw(); }
  };
  const nearest = ({target, clientX, clientY}) => {
    const picture = pictures.find(({svg}) => svg.contains(target));
    const {a, d, e, f} = picture?.svg.getScreenCTM() ?? {};
    let [best, least] = [-1, 16];  // Pixels of the screen.
    for (const [i, x, y] of picture?.points ?? []) {
      const far = Math.hypot(a * x + e - clientX, d * y + f - clientY);
      if (far < least && passes[i] !== false) [best, least] = [i, far];
    }
    return best;
  };
  document.addEventListener(
    'pointermove', (event) => hover(nearest(event), event));
  document.addEventListener('click', (event) => {
    const marked = nearest(event);
    const row = models.indexOf(event.target.closest('tr'));
    const i = Math.max(marked, row);  // One of them is -1.
    if (i >= 0) selected = i === selected ? -1 : i;
    hover(marked, event);
    draw();
  });
  models.forEach((row) => { row.tabIndex = 0; });

  const bar = document.createElement('p');
  bar.className = 'filter';
  bar.innerHTML = `Filter: <select aria-label="column"></select>
    <select aria-label="comparison"><option>=<option>≥<option>≤</select>
    <input aria-label="value" placeholder="value" list="values">
    <span></span><datalist id="values"></datalist>`;
  const [of, how, value, count, values] = bar.children;
  of.append(...heads.slice(1).map((head) => new Option(head)));
  const filter = () => {
    const k = of.selectedIndex + 1;
    const column = cells.map((row) => row[k]);
    const compare = order([...column, value.value]);
    passes = column.map((text) => {
      if (!text || !value.value) return undefined;
      const difference = compare(text, value.value);
      return how.value === '=' ? difference === 0
        : how.value === '≥' ? difference >= 0 : difference <= 0;
    });
    const left = passes.filter((x) => x !== false).length;
    count.textContent = `${left} of ${models.length}`;
    values.replaceChildren(...[...new Set(column)].map((x) => new Option(x)));
    draw();
  };
  bar.addEventListener('input', filter);
  filter();
  (pictures[0]?.svg.closest('.pictures') ?? table.parentNode).before(bar);
})();
