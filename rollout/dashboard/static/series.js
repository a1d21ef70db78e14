// The rows that came, column by column.

const MOST = 50000;

/** Columns of numbers over one x. Missing and non-finite values are NaN: a chart leaves a gap. */
export class Series {
  constructor() {
    this.clear();
  }

  clear() {
    this.next = 0;
    this.x = [];
    this.columns = new Map();
  }

  /** Take in a page. One that begins behind what is known leaves a row of gaps between. */
  add(page) {
    const x = page?.x ?? [];
    if (!page) return;
    if (this.x.length && page.first > this.next && x.length) this.#row(x[0], () => NaN);
    const skip = Math.max(0, this.next - page.first);
    for (let i = skip; i < x.length; i += 1) this.#row(x[i], (name) => page.columns[name]?.[i] ?? NaN, page.columns);
    this.next = page.next;
    if (this.x.length > MOST) this.#trim(this.x.length - MOST);
  }

  column(name) {
    return this.columns.get(name) ?? [];
  }

  /** Whether a column has any value. */
  has(name) {
    return this.column(name).some((value) => !Number.isNaN(value));
  }

  /** The last value of a column, or null. */
  last(name) {
    const column = this.column(name);
    const value = column[column.length - 1];
    return value === undefined || Number.isNaN(value) ? null : value;
  }

  #row(x, value, names = {}) {
    for (const name of Object.keys(names)) {
      if (!this.columns.has(name)) this.columns.set(name, new Array(this.x.length).fill(NaN));
    }
    this.x.push(x);
    for (const [name, column] of this.columns) column.push(value(name));
  }

  #trim(count) {
    this.x.splice(0, count);
    for (const column of this.columns.values()) column.splice(0, count);
  }
}

/** The index of the x nearest to a value; -1 without rows. */
export function nearest(x, value) {
  let low = 0;
  let high = x.length - 1;
  if (high < 0) return -1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (x[middle] < value) low = middle; else high = middle;
  }
  return Math.abs(x[low] - value) <= Math.abs(x[high] - value) ? low : high;
}
