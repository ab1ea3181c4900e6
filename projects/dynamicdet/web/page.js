// The static page: the two graphs of `tools/export.py --standalone` in onnxruntime-web. What
// runtime.py does to a picture is done here to the last bit; a test compares both.
import * as ort from './ort.wasm.min.mjs';

const FORMAT = 'dynamicdet.standalone', VERSION = 1;
// Of a picture file, and of its pixels: more is refused before it is decoded.
const MOST_BYTES = 30e6, MOST_PIXELS = 50e6;
// Graphs that take less are run three times, and the median counts.
const QUICK = 0.2;

ort.env.wasm.wasmPaths = new URL('./', import.meta.url).href;
// Threads need headers that a plain file server does not send.
ort.env.wasm.numThreads = 1;

// An image, (H, W, 3), with other sides, bilinear, in float32 as numpy computes.
function resized(image, [width, height], [newWidth, newHeight]) {
  const along = (values, count, old, now, step, start) => {
    const out = new Float32Array(count * now);
    for (let to = 0; to < now; to++) {
      const at = Math.min(old - 1, Math.max(0, ((to + 0.5) * old) / now - 0.5));
      const low = Math.floor(at), high = Math.min(low + 1, old - 1);
      const share = Math.fround(at - low), rest = Math.fround(1 - share);
      for (let index = 0; index < count; index++) {
        const base = start(index);
        const from = Math.fround(values[base + low * step] * rest);
        out[start(index, now) + to * step] = from + Math.fround(values[base + high * step] * share);
      }
    }
    return out;
  };
  const row = 3 * width, newRow = 3 * newWidth;
  // Rows first: each column and color is one line; then columns: each row and color.
  const tall = along(image, row, height, newHeight, row, (index) => index);
  const wide = along(tall, 3 * newHeight, width, newWidth, 3,
    (index, now) => Math.floor(index / 3) * (now ? newRow : row) + (index % 3));
  return Uint8Array.from(wide, halfToEven);
}

function halfToEven(value) {
  const low = Math.floor(value), rest = value - low;
  return rest < 0.5 || (rest === 0.5 && low % 2 === 0) ? low : low + 1;
}

// As `deliver` of runtime.py: an image, (H, W, 3), resized and padded, and the factors of its sides.
export function deliver(about, image, old) {
  let size = old;
  if (about.resize) {
    const sorted = (sides) => [...sides].sort((a, b) => a - b);
    const limits = sorted(about.resize.scale), sides = sorted(old);
    const factor = Math.min(limits[0] / sides[0], limits[1] / sides[1]);
    const shrunk = old.map((side) => Math.max(1, Math.trunc(side * factor + 0.5)));
    size = about.resize.keep_ratio ? shrunk : about.resize.scale;
    image = resized(image, old, size);
  }
  let padded = size;
  if (about.pad) {
    const {divisor, value} = about.pad, square = about.pad.square ? Math.max(...size) : 0;
    const sides = about.pad.size ?? [square, square];
    padded = size.map((side, at) => Math.ceil(Math.max(side, sides[at]) / divisor) * divisor);
    const canvas = new Uint8Array(3 * padded[0] * padded[1]);
    for (let at = 0; at < canvas.length; at++) canvas[at] = value[at % 3];
    for (let y = 0; y < size[1]; y++) {
      canvas.set(image.subarray(3 * size[0] * y, 3 * size[0] * (y + 1)), 3 * padded[0] * y);
    }
    image = canvas;
  }
  return {image, size: padded, scale: [size[0] / old[0], size[1] / old[1]]};
}

// Pixels of a picture file as runtime.py reads them, (H, W, 3), blue first, upright.
async function decode(file) {
  if (file.size > MOST_BYTES) throw new Error(`has more than ${MOST_BYTES / 1e6} MB`);
  const src = URL.createObjectURL(file), image = new Image();
  try {
    // Its size is known before it is decoded.
    await new Promise((done, fail) => {
      Object.assign(image, {onload: done, onerror: () => fail(new Error('is no picture, or damaged')), src});
    });
    if (image.naturalWidth * image.naturalHeight > MOST_PIXELS) {
      throw new Error(`has more than ${MOST_PIXELS / 1e6} million pixels`);
    }
    if (!image.naturalWidth || !image.naturalHeight) throw new Error('has no size in pixels');
    const options = {colorSpaceConversion: 'none', premultiplyAlpha: 'none'};
    const bitmap = await createImageBitmap(file, options)
      .catch(() => { throw new Error('is no picture, or damaged'); });
    const size = [bitmap.width, bitmap.height];
    const canvas = new OffscreenCanvas(...size), context = canvas.getContext('2d');
    context.drawImage(bitmap, 0, 0);
    const rgba = context.getImageData(0, 0, ...size).data;
    const pixels = new Uint8Array(3 * size[0] * size[1]);
    for (let from = 0, to = 0; to < pixels.length; from += 4, to += 3) {
      pixels[to] = rgba[from + 2];
      pixels[to + 1] = rgba[from + 1];
      pixels[to + 2] = rgba[from];
    }
    return {src, pixels, size};
  } catch (error) {
    URL.revokeObjectURL(src);
    throw error;
  }
}

async function timed(run) {
  const seconds = [];
  let result;
  do {
    const start = performance.now();
    result = await run();
    seconds.push((performance.now() - start) / 1000);
  } while (seconds[0] < QUICK && seconds.length < 3);
  return [result, seconds.sort((a, b) => a - b)[seconds.length >> 1]];
}

function planes(image) {
  const count = image.length / 3, out = new Uint8Array(image.length);
  for (let at = 0; at < count; at++) {
    for (let color = 0; color < 3; color++) out[color * count + at] = image[3 * at + color];
  }
  return out;
}

const rows = (values) => {
  const flat = Array.from(values.boxes.data), boxes = [];
  for (let at = 0; at < flat.length; at += 4) boxes.push(flat.slice(at, at + 4));
  return {boxes, scores: Array.from(values.scores.data), labels: Array.from(values.labels.data, Number)};
};

// A picture through both exits, once.
export async function detect(detector, pixels, old) {
  const {image, size, scale} = deliver(detector.about, pixels, old);
  const values = {
    image: new ort.Tensor('uint8', planes(image), [1, 3, size[1], size[0]]),
    scale: new ort.Tensor('float32', scale, [2]),
    original: new ort.Tensor('float32', [old[1], old[0]], [2]),
  };
  const exits = [], seconds = [];
  let difficulty = null, spent = 0;
  for (const session of detector.sessions) {
    const feed = Object.fromEntries(session.inputNames.map((name) => [name, values[name]]));
    const [found, took] = await timed(() => session.run(feed));
    Object.assign(values, found);
    difficulty ??= found.difficulty.data[0];
    seconds.push((spent += took));
    exits.push(rows(found));
  }
  return {width: old[0], height: old[1], difficulty, seconds, exits};
}

async function bytes(name) {
  const answer = await fetch(name);
  if (!answer.ok) throw new Error(`${name} is missing: make the page again`);
  return new Uint8Array(await answer.arrayBuffer());
}

async function load() {
  const about = JSON.parse(new TextDecoder().decode(await bytes('detector.json')));
  const sessions = [];
  if (about.format !== FORMAT || about.version !== VERSION) {
    throw new Error('detector.json is of another version: export the detector again');
  }
  for (const [name, digest] of Object.entries(about.graphs)) {
    const content = await bytes(name);
    if (crypto.subtle) {
      const found = new Uint8Array(await crypto.subtle.digest('SHA-256', content));
      const hex = Array.from(found, (one) => one.toString(16).padStart(2, '0')).join('');
      if (hex !== digest) throw new Error(`${name} was changed: make the page again`);
    }
    sessions.push(await ort.InferenceSession.create(content, {executionProviders: ['wasm']}));
  }
  return {about, sessions};
}

const find = (id) => document.getElementById(id);

function say(text, isFault = false) {
  find('status').textContent = text;
  find('status').classList.toggle('fault', isFault);
}

async function start() {
  const viewer = DynamicViewer.mount(find('viewer'));
  const detector = await load();
  const {about} = detector;
  let shown = [], queue = Promise.resolve();

  async function take(files) {
    const pictures = [], faults = [];
    for (const [at, file] of [...files].entries()) {
      say(`Picture ${at + 1} of ${files.length} …`);
      // Lets the browser draw.
      await new Promise((done) => setTimeout(done));
      try {
        const {src, pixels, size} = await decode(file);
        const found = await detect(detector, pixels, size);
        pictures.push({name: file.name, src, ...found});
      } catch (error) {
        faults.push(`${file.name} ${error.message}`);
      }
    }
    shown.forEach((picture) => URL.revokeObjectURL(picture.src));
    shown = pictures;
    const {classes, threshold, difficulties, gflops} = about;
    viewer.show({classes, threshold, difficulties, gflops, pictures, faults});
    say(pictures.length ? 'Ready.' : 'No picture could be read.', !pictures.length);
  }
  // One after the other, whoever drops while pictures are on their way.
  const enqueue = (files) => (queue = queue.then(() => take(files)));

  const examples = JSON.parse(new TextDecoder().decode(await bytes('examples.json')));
  const files = await Promise.all(examples.map(async (name) => new File([await bytes(name)], name)));
  // The first run is slower.
  if (files.length) await decode(files[0]).then(({pixels, size}) => detect(detector, pixels, size));
  if (files.length) await enqueue(files);
  else say('Ready: drop a picture.');

  const drop = find('drop');
  find('files').addEventListener('change', ({target}) => {
    if (target.files.length) enqueue([...target.files]);
    target.value = '';
  });
  for (const kind of ['dragover', 'dragleave', 'drop']) {
    addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle('over', kind === 'dragover');
      const files = kind === 'drop' ? [...event.dataTransfer.files] : [];
      if (files.length) enqueue(files);
    });
  }
  const megabytes = (about.bytes ?? 0) / 1e6;
  find('about').textContent = `Runs on this device alone, in WebAssembly with one thread${
    megabytes ? `; ${megabytes.toFixed(1)} MB of graphs` : ''}. Times are of this browser, from the `
    + 'resized picture to its boxes; exit 1 includes exit 0.';
  // For tests.
  Object.assign(globalThis, {detector, deliver, decode});
}

start().catch((error) => say(
  location.protocol === 'file:'
    ? 'This page needs a file server: python -m http.server'
    : `This page cannot start: ${error.message}`, true));
