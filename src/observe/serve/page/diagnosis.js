// The bottleneck in words, with the setting that would relieve it.

let announced = null;

function showDiagnosis(status) {
  const diagnosis = status.diagnosis;
  const headline = diagnosis ? held(diagnosis.headline) : unmeasured(status);
  setText(byId("headline"), headline);
  byId("limits").dataset.known = Boolean(diagnosis?.role);
  setOptional(byId("detail"), held(diagnosis?.detail ?? ""));
  setOptional(byId("gain"), diagnosis ? gainWords(diagnosis) : null);
  showSettings(diagnosis?.settings ?? []);
  showController(status.controller ?? []);
  announce(`${diagnosis?.role}/${status.phase}`, headline);
}

/** Replaces the space before percent signs by a no-break space. */
function held(text) {
  return text.replaceAll(/(\d) %/g, `$1${SPACE}%`);
}

function unmeasured(status) {
  if (status.graph) {
    return "The bottleneck is being measured: it is shown once the actors have worked for a while.";
  }
  return `There is nothing to measure yet: the phase is “${status.phase}”, and the actors start after it.`;
}

function gainWords(diagnosis) {
  const { gain, next, role } = diagnosis;
  if (!role || !(gain > 1.005)) return null;
  const until = next ? `then ${next} would be the bottleneck` : "no other actor would be the bottleneck before that";
  return `Without this bottleneck, the run could be up to ${gain.toFixed(gain < 10 ? 1 : 0)} times as fast; ${until}.`;
}

function showSettings(settings) {
  setShown(byId("settings"), settings.length > 0);
  if (settings.length === 0) return;
  byId("settings-rows").replaceChildren(...settings.map((setting) =>
    element("tr", {},
      element("th", { scope: "row" }, element("code", {}, setting.key)),
      element("td", { "data-name": "now" }, element("code", {}, String(setting.now))),
      element("td", { "data-name": "try" }, element("code", {}, String(setting.try))),
      element("td", { "data-name": "why" }, setting.why))));
  setText(byId("settings-example"), `--resume --set ${settings[0].key}=${settings[0].try}`);
}

function showController(knobs) {
  setShown(byId("controller"), knobs.length > 0);
  byId("controller-knobs").replaceChildren(...knobs.map((knob) =>
    element("li", {}, element("strong", {}, `${knob.knob} ${knob.value}`),
      ` of ${knob.low} to ${knob.high}${knob.last_move ? `; last change ${knob.last_move}` : ""}`)));
}

/** Announces `words` to screen readers when `about` has changed, but not each time that a percentage changes. */
function announce(about, words) {
  if (about === announced) return;
  announced = about;
  setText(byId("announcer"), words);
}
