// The colour theme: light, dark, or the system's.

const THEME_KEY = "preceptor-theme";
const THEMES = ["system", "light", "dark"];

function useTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  setText(byId("theme"), `Theme: ${theme}`);
}

function startTheme() {
  let theme = remembered("localStorage", THEME_KEY);
  if (!THEMES.includes(theme)) theme = "system";
  useTheme(theme);
  byId("theme").addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    remember("localStorage", THEME_KEY, theme === "system" ? null : theme);
    useTheme(theme);
  });
}
