/* The part of the page that moves: the trade-off chart, its switches and the slider.

It reads what it draws from the JSON in the element `data`:
  points: one per threshold, from all easy to all hard: threshold, share, easy, hard (numbers of
    images), ap, gflops, latency (ms).
  lines: name, color, dash, shown, dots (whether points are marked), and points of gflops, latency, ap and, where there is a band, low
    and high. The first is the router's own.
  start: the index of the point to begin at. colors: of the first and the last exit.

The address keeps the setting (#at=50&cost=latency&lines=0,1,4), so that a link shows the same. */
'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const slider = document.getElementById('threshold');
const chart = document.getElementById('chart');
const UNITS = {gflops: 'GFLOPs per image', latency: 'ms per image'};
const INK = '#222', FAINT = '#ddd', GRAY = '#555';
const state = {at: data.start, cost: 'gflops', lines: data.lines.map(line => line.shown)};

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const at = Number(given.get('at'));
  if (given.has('at') && at >= 0 && at < data.points.length) state.at = Math.round(at);
  if (given.get('cost') in UNITS) state.cost = given.get('cost');
  if (given.has('lines')) {
    const shown = given.get('lines').split(',');
    state.lines = data.lines.map((_, index) => shown.includes(String(index)));
  }
}

function writeAddress() {
  const shown = data.lines.map((_, index) => index).filter(index => state.lines[index]);
  const address = `#at=${state.at}&cost=${state.cost}&lines=${shown.join(',')}`;
  try { history.replaceState(null, '', address); } catch (error) { /* Not allowed everywhere. */ }
}

/* The numbers under the slider. */
function tell() {
  const point = data.points[state.at];
  const words = {
    threshold: point.threshold.toFixed(4),
    share: (100 * point.share).toFixed(0) + ' %',
    easy: String(point.easy),
    hard: String(point.hard),
    ap: point.ap.toFixed(2),
    gflops: point.gflops.toPrecision(3),
    latency: point.latency.toFixed(1) + ' ms'
  };
  for (const name in words) document.getElementById('now-' + name).textContent = words[name];
  slider.value = state.at;
  slider.setAttribute('aria-valuetext',
    `threshold ${words.threshold}: ${words.share} hard, AP ${words.ap}`);
}

/* A few round numbers from low to high. */
function ticks(low, high, wanted) {
  const rough = (high - low) / wanted, power = Math.pow(10, Math.floor(Math.log10(rough)));
  const step = power * [1, 2, 5, 10].find(times => times * power >= rough);
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high + step * 1e-9; k++) found.push(k * step);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return found.map(value => ({value, text: value.toFixed(digits)}));
}

function element(name, attributes, text) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  return made;
}

function range(values, share) {
  const low = Math.min(...values), high = Math.max(...values);
  const more = share * (high - low) || 1;
  return [low - more, high + more];
}

let place = null;

function draw() {
  const cost = state.cost, width = Math.max(280, chart.clientWidth);
  const height = Math.round(Math.min(440, Math.max(300, 0.66 * width)));
  const box = {left: 44, right: width - 12, top: 24, bottom: height - 42};
  const shown = data.lines.filter((_, index) => state.lines[index]);
  const all = shown.flatMap(line => line.points);
  const [x0, x1] = range(all.concat(data.points).map(point => point[cost]), 0.05);
  const heights = all.concat(data.points).flatMap(
    point => [point.ap, point.low ?? point.ap, point.high ?? point.ap]);
  const [y0, y1] = range(heights, 0.08);
  const x = value => box.left + (value - x0) / (x1 - x0) * (box.right - box.left);
  const y = value => box.bottom - (value - y0) / (y1 - y0) * (box.bottom - box.top);
  place = {x, cost};
  const now = data.points[state.at];
  const svg = element('svg', {width, height, viewBox: `0 0 ${width} ${height}`, role: 'img',
    'aria-label': `AP against ${UNITS[cost]}; now ${(100 * now.share).toFixed(0)} percent hard, ` +
      `AP ${now.ap.toFixed(2)}`});
  drawAxes(svg, box, x, y, ticks(x0, x1, width < 500 ? 4 : 7), ticks(y0, y1, 6), cost);
  const path = points => points.map(
    (point, k) => (k ? 'L' : 'M') + x(point[cost]).toFixed(1) + ' ' + y(point.ap).toFixed(1)).join('');
  for (const line of shown) drawBand(svg, line, x, y, cost);
  for (const line of shown.slice().reverse()) {
    svg.append(element('path', {d: path(line.points), fill: 'none', stroke: line.color,
      'stroke-width': line === data.lines[0] ? 2.6 : 1.8, 'stroke-dasharray': line.dash}));
  }
  for (const line of shown.filter(line => line.dots)) {
    for (const point of line.points) {
      svg.append(element('circle', {cx: x(point[cost]), cy: y(point.ap), r: 4, fill: line.color}));
    }
  }
  drawEnds(svg, x, y, cost);
  svg.append(element('circle', {cx: x(now[cost]), cy: y(now.ap), r: 8, fill: '#fff', stroke: INK,
    'stroke-width': 3}));
  const label = `${(100 * now.share).toFixed(0)} % hard, AP ${now.ap.toFixed(1)}`;
  const left = x(now[cost]) > (box.left + box.right) / 2;
  // Curves rise: above them there is room on the left, below on the right.
  svg.append(element('text', {x: x(now[cost]) + (left ? -8 : 8),
    y: left ? Math.max(box.top + 10, y(now.ap) - 14) : Math.min(box.bottom - 6, y(now.ap) + 26),
    'text-anchor': left ? 'end' : 'start', 'font-size': 14, 'font-weight': 600, fill: INK,
    stroke: '#fff', 'stroke-width': 4, 'paint-order': 'stroke'}, label));
  chart.replaceChildren(svg);
}

function drawAxes(svg, box, x, y, across, up, cost) {
  for (const tick of across) {
    svg.append(element('line', {x1: x(tick.value), x2: x(tick.value), y1: box.top, y2: box.bottom,
      stroke: FAINT}));
    svg.append(element('text', {x: x(tick.value), y: box.bottom + 18, 'text-anchor': 'middle',
      'font-size': 13, fill: GRAY}, tick.text));
  }
  for (const tick of up) {
    svg.append(element('line', {x1: box.left, x2: box.right, y1: y(tick.value), y2: y(tick.value),
      stroke: FAINT}));
    svg.append(element('text', {x: box.left - 6, y: y(tick.value) + 4, 'text-anchor': 'end',
      'font-size': 13, fill: GRAY}, tick.text));
  }
  svg.append(element('text', {x: (box.left + box.right) / 2, y: box.bottom + 37,
    'text-anchor': 'middle', 'font-size': 13, fill: INK}, UNITS[cost]));
  svg.append(element('text', {x: 4, y: 14, 'font-size': 13, fill: INK}, 'AP (%)'));
}

function drawBand(svg, line, x, y, cost) {
  const points = line.points.filter(point => point.low !== undefined);
  if (points.length < 2) return;
  const side = (some, key) => some.map(
    point => x(point[cost]).toFixed(1) + ' ' + y(point[key]).toFixed(1)).join('L');
  svg.append(element('path', {fill: line.color, 'fill-opacity': line === data.lines[0] ? 0.16 : 0.1,
    d: 'M' + side(points, 'high') + 'L' + side(points.slice().reverse(), 'low') + 'Z'}));
}

function drawEnds(svg, x, y, cost) {
  [data.points[0], data.points[data.points.length - 1]].forEach((end, exit) => {
    svg.append(element('rect', {x: x(end[cost]) - 6, y: y(end.ap) - 6, width: 12, height: 12,
      fill: data.colors[exit]}));
  });
}

function update() {
  for (const input of document.querySelectorAll('input[name=cost]'))
    input.checked = input.value === state.cost;
  for (const input of document.querySelectorAll('input[data-line]'))
    input.checked = state.lines[Number(input.dataset.line)];
  tell();
  draw();
}

function change() { writeAddress(); update(); }

slider.addEventListener('input', () => { state.at = Number(slider.value); change(); });
for (const input of document.querySelectorAll('input[name=cost]'))
  input.addEventListener('change', () => { state.cost = input.value; change(); });
for (const input of document.querySelectorAll('input[data-line]'))
  input.addEventListener('change', () => {
    state.lines[Number(input.dataset.line)] = input.checked;
    change();
  });
chart.addEventListener('click', event => {
  const from = chart.getBoundingClientRect().left;
  const far = point => Math.abs(place.x(point[place.cost]) - (event.clientX - from));
  state.at = data.points.reduce((best, point, k) => far(point) < far(data.points[best]) ? k : best, 0);
  change();
});
window.addEventListener('hashchange', () => { readAddress(); update(); });
window.addEventListener('resize', draw);
readAddress();
update();
