// Asking the node.

const PATIENCE_MS = 8000;
const TOKEN_KEY = "preceptor-token";

class TokenNeeded extends Error {}

let nodeToken = remembered("sessionStorage", TOKEN_KEY);

/** Kept for this tab; null to forget it. */
function useToken(token) {
  nodeToken = token;
  remember("sessionStorage", TOKEN_KEY, token);
}

/** The answer to GET `path`. Throws TokenNeeded on 401, else an error that says what happened. */
async function ask(path) {
  const patience = new AbortController();
  const timer = setTimeout(() => patience.abort(), PATIENCE_MS);
  try {
    const answer = await fetch(path, {
      headers: nodeToken ? { Authorization: `Bearer ${nodeToken}` } : {},
      signal: patience.signal,
      cache: "no-store",
    });
    if (answer.status === 401) throw new TokenNeeded(path);
    if (!answer.ok) throw new Error(`it answered ${answer.status} to ${path}`);
    return await answer.json();
  } catch (error) {
    if (patience.signal.aborted) throw new Error(`no answer to ${path} within ${PATIENCE_MS / 1000} s`);
    throw error;
  } finally {
    clearTimeout(timer);
  }
}
