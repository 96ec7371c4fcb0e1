// Requests to the node.

const PATIENCE_MS = 8000;
const TOKEN_KEY = "preceptor-token";

class TokenNeeded extends Error {}

let nodeToken = remembered("sessionStorage", TOKEN_KEY);

/** Sets the token, which is kept for this tab; null forgets it. */
function useToken(token) {
  nodeToken = token;
  remember("sessionStorage", TOKEN_KEY, token);
}

/** Returns the JSON response to GET `path`. Throws TokenNeeded on 401, and an error with the cause on other failures. */
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
