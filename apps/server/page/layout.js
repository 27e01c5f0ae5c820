// Where each block of a memory bank goes in the icicle, in a square of side 1, and which of them can be seen.
//
// Siblings share their parent's width in proportion to the bytes of their subtrees, and a block is as tall as its own
// bytes then ask for: areas are bytes, and every branch reaches the lower edge. apps/picture/icicle.py does the same
// for the PNG; tests/page/test_page_picture.py compares the two.

const THIN = 6; // px: children that are narrower, on average, are not drawn one by one

/**
 * The tree above `nodes`, rows of /v1/memory: its root. `levels[n]` lists the blocks of level n from left to right,
 * `blocks` all of them, each before what is below it (its `order` counts them), and `found` maps paths to nodes.
 */
export function layout(nodes) {
  const root = branch("", null);
  const found = new Map([["", root]]);
  for (const row of nodes) {
    const steps = row.path.split(".");
    let here = root;
    root.subtree += row.bytes;
    for (let level = 1; level <= steps.length; level++) {
      const path = steps.slice(0, level).join(".");
      let next = found.get(path);
      if (!next) {
        next = branch(path, here);
        found.set(path, next);
        here.children.push(next);
      }
      next.subtree += row.bytes;
      here = next;
    }
    here.row = row;
  }
  place(root);
  root.found = found;
  return root;
}

function branch(path, parent) {
  const level = parent ? parent.level + 1 : 0;
  return { path, parent, level, step: Number(path.split(".").at(-1)), children: [], subtree: 0, row: null };
}

function place(root) {
  root.levels = [];
  root.blocks = [];
  const left = [[root, 0, 0, 1]];
  while (left.length) {
    const [node, x, y, width] = left.pop();
    const height = node.row ? node.row.bytes / root.subtree / width : 0;
    Object.assign(node, { x, y, width, height });
    if (node.row) root.blocks.push(node);
    let start = x + width;
    node.children = node.children.filter((child) => child.subtree).sort((a, b) => a.step - b.step);
    const below = node.children.reduce((sum, child) => sum + child.subtree, 0);
    for (const child of node.children.toReversed()) {
      const share = (width * child.subtree) / below;
      start -= share;
      left.push([child, start, y + height, share]);
    }
  }
  for (const [order, node] of root.blocks.entries()) {
    root.levels[node.level] ??= [];
    node.index = root.levels[node.level].push(node) - 1;
    node.order = order;
  }
}

/** Whether `node` is `top` or below it. */
export function within(node, top) {
  return !top.path || node.path === top.path || node.path.startsWith(top.path + ".");
}

/**
 * What can be seen of `top`, drawn so many px wide: the `blocks` that are broad enough, and as one each the `folds`,
 * nodes whose children are not. The children of `top` itself are always drawn.
 */
export function unfold(top, width) {
  const [blocks, folds, left] = [[], [], [top]];
  while (left.length) {
    const node = left.pop();
    if (node.row) blocks.push(node);
    const each = (width * node.width) / top.width / node.children.length;
    if (node !== top && each < THIN) folds.push(node);
    else left.push(...node.children.toReversed()); // the first comes out first
  }
  return { blocks, folds };
}

/** The node that an arrow key, Home or End leads to from `node`, no higher than `top`; null where there is none. */
export function neighbour(root, node, key, top) {
  const level = root.levels[node.level];
  const inside = (other) => (other && other.row && within(other, top) ? other : null);
  switch (key) {
    case "ArrowLeft":
      return inside(level[node.index - 1]);
    case "ArrowRight":
      return inside(level[node.index + 1]);
    case "Home":
      return level.find(inside) ?? null;
    case "End":
      return level.findLast(inside) ?? null;
    case "ArrowUp": {
      let up = node.parent;
      while (up && !up.row) up = up.parent;
      return inside(up);
    }
    case "ArrowDown":
      return firstBlock(node);
    default:
      return null;
  }
}

/** The first block below `node`. */
export function firstBlock(node) {
  const child = node.children[0];
  return !child || child.row ? (child ?? null) : firstBlock(child);
}
