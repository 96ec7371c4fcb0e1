// Checks dashboards against Grafana's types (dashboard.ts) and against the rules below, which types cannot express.
//
//   node check.mjs [FOLDER]      FOLDER of dashboards; default: ../dashboards
//
// Exit status 0 if all are correct, else 1, with a line for each fault.

import { readdirSync, readFileSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import ts from 'typescript';

const here = dirname(fileURLToPath(import.meta.url));
const folder = resolve(process.argv[2] ?? join(here, '../dashboards'));

const UNITS = new Set(['none', 'short', 'percentunit', 's', 'bytes', 'sci']);
const UNIT_FORM = /^suffix: [a-z]+(\/[a-z]+)?$/;
const COLUMNS = 24;

const files = readdirSync(folder).filter((name) => name.endsWith('.json')).sort();
const faults = files.length ? [] : [`${folder}: no dashboard`];
const uids = new Map();
const texts = new Map();
for (const file of files) {
  const text = readFileSync(join(folder, file), 'utf8');
  try {
    faults.push(...rules(file, JSON.parse(text)).map((fault) => `${file}: ${fault}`));
    texts.set(file, text);
  } catch (error) {
    faults.push(`${file}: ${error.message}`);
  }
}
faults.push(...types(texts));
for (const fault of faults) console.error(fault);
console.log(`${files.length} dashboards, ${faults.length} faults`);
process.exit(faults.length ? 1 : 0);

/** Returns the compiler's errors for dashboards (texts by file), each compiled as a literal. */
function types(texts) {
  const before = 'import type { Dashboard } from "./dashboard";\nexport const it: Dashboard =\n';
  const sources = new Map([...texts].map(([file, text]) => [join(here, `${file}.check.ts`), { file, text: before + text }]));
  const options = {
    strict: true,
    noEmit: true,
    skipLibCheck: true,
    target: ts.ScriptTarget.ES2022,
    module: ts.ModuleKind.ESNext,
    moduleResolution: ts.ModuleResolutionKind.Bundler,
    types: [],
  };
  const host = ts.createCompilerHost(options);
  const { getSourceFile, fileExists, readFile } = host;
  host.fileExists = (name) => sources.has(name) || fileExists(name);
  host.readFile = (name) => sources.get(name)?.text ?? readFile(name);
  host.getSourceFile = (name, target, ...rest) =>
    sources.has(name) ? ts.createSourceFile(name, sources.get(name).text, target) : getSourceFile(name, target, ...rest);
  const program = ts.createProgram([...sources.keys()], options, host);
  return ts.getPreEmitDiagnostics(program).map((one) => {
    const ours = sources.get(one.file?.fileName);
    const line = one.file ? one.file.getLineAndCharacterOfPosition(one.start).line + 1 : 0;
    const where = ours ? `${ours.file}:${line - 2}` : `${one.file?.fileName ?? 'types'}:${line}`;
    return `${where}: ${ts.flattenDiagnosticMessageText(one.messageText, '\n    ')}`;
  });
}

/** Returns the violations of the rules that all dashboards of this folder follow. */
function rules(file, dashboard) {
  const found = [];
  const name = file.replace(/\.json$/, '');
  if (dashboard.uid !== `preceptor-${name}`) found.push(`uid is ${dashboard.uid}, not preceptor-${name}`);
  if (uids.has(dashboard.uid)) found.push(`uid ${dashboard.uid} is used by ${uids.get(dashboard.uid)}, too`);
  uids.set(dashboard.uid, file);
  if (!dashboard.tags?.includes('preceptor')) found.push('is not tagged preceptor');
  if (!dashboard.links?.some((link) => link.type === 'dashboards' && link.tags.includes('preceptor') && link.includeVars)) {
    found.push('does not link to the others');
  }
  const variables = new Set((dashboard.templating?.list ?? []).map((one) => one.name));
  for (const needed of ['datasource', 'instance']) {
    if (!variables.has(needed)) found.push(`has no variable ${needed}`);
  }
  const panels = (dashboard.panels ?? []).flatMap((panel) => [panel, ...(panel.panels ?? [])]);
  const ids = new Set();
  const titles = new Set();
  for (const panel of panels) {
    const say = (fault) => found.push(`panel ${panel.id} ${JSON.stringify(panel.title)}: ${fault}`);
    if (ids.has(panel.id)) say('another panel has the same id');
    ids.add(panel.id);
    if (titles.has(panel.title)) say('another panel has the same title');
    titles.add(panel.title);
    place(panel, panels, say);
    if (panel.type === 'row') continue;
    if (panel.type !== 'text') queries(panel, variables, say);
    if (!panel.description) say('has no description');
    const overridden = (panel.fieldConfig?.overrides ?? []).flatMap((one) => one.properties);
    const special = overridden.filter((one) => one.id === 'unit').map((one) => one.value);
    const units = [panel.fieldConfig?.defaults?.unit, panel.options?.yAxis?.unit, ...special].filter(Boolean);
    if (panel.type !== 'state-timeline' && !units.length) say('has no unit');
    for (const unit of units) {
      if (!UNITS.has(unit) && !UNIT_FORM.test(unit)) say(`unit ${JSON.stringify(unit)} is unknown`);
    }
    if (panel.repeat && !variables.has(panel.repeat)) say(`repeats for ${panel.repeat}, which is not a variable`);
  }
  return found;
}

/** Checks that a panel is within the grid and overlaps no other panel. */
function place(panel, panels, say) {
  const at = panel.gridPos;
  const valid = at && [at.h, at.w, at.x, at.y].every((n) => Number.isInteger(n) && n >= 0);
  if (!valid || at.w < 1 || at.h < 1 || at.x + at.w > COLUMNS) return say(`does not fit the grid: ${JSON.stringify(at)}`);
  for (const other of panels) {
    const its = other.gridPos;
    if (other.id <= panel.id || !its) continue;
    const apart = at.x + at.w <= its.x || its.x + its.w <= at.x || at.y + at.h <= its.y || its.y + its.h <= at.y;
    if (!apart) say(`overlaps panel ${other.id} ${JSON.stringify(other.title)}`);
  }
}

/** Checks that every query has a unique name, an expression for the selected node, and the selected data source. */
function queries(panel, variables, say) {
  if (!panel.targets?.length) say('has no target');
  const names = new Set();
  for (const target of panel.targets ?? []) {
    if (names.has(target.refId)) say(`two targets have the name ${target.refId}`);
    names.add(target.refId);
    if (!target.expr?.trim()) say(`target ${target.refId} has no expr`);
    if (target.datasource?.uid !== '${datasource}') say(`target ${target.refId} does not use the variable datasource`);
    const selectors = (target.expr ?? '').match(/\b(preceptor|process)_\w+(\{[^}]*\})?/g) ?? [];
    for (const selector of selectors) {
      if (!selector.includes('instance=~"$instance"')) say(`target ${target.refId}: ${selector} is not limited to the node`);
    }
    for (const [, used] of (target.expr ?? '').matchAll(/\$\{?(\w+)/g)) {
      if (!used.startsWith('__') && !variables.has(used)) say(`target ${target.refId}: $${used} is not a variable`);
    }
  }
}
