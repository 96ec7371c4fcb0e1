//! Outcomes of exchanges with a judge: which failures are retried, and when.

use std::time::{Duration, SystemTime};

use super::abilities::FieldRefusal;

/// Outcome of an HTTP exchange, as it is counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExchangeOutcome {
    /// An answer that could be read.
    Ok,
    /// No answer in time.
    Timeout,
    /// No connection, or a connection that was lost.
    Connection(String),
    /// A connection that the server closed before it sent any part of a response, as servers do with idle connections.
    Closed(String),
    /// A connection that ended before the answer was complete.
    BrokeOff(String),
    /// An answer that could not be read.
    Malformed(String),
    /// A 429 for the request rate, with the pause that the server asked for and its message.
    RateLimited(Option<Duration>, String),
    /// A 402, or a 429 that reports an exhausted quota, with the server's message.
    Quota(u16, String),
    /// Another status from 400 to 499, with the server's message; or one from 300 to 399, with the target of the
    /// redirect. Redirects are not followed.
    Refused(u16, String),
    /// A status of 400 or above that refuses a field of the request, with the server's message and the field.
    Field(u16, String, FieldRefusal),
    /// An answer that the server withheld from this question.
    Filtered(String),
    /// An answer of a different model than the first answer: the names of both.
    OtherModel(String, String),
    /// A status of 500 or above, with the pause that the server asked for and its message.
    Server(u16, Option<Duration>, String),
    /// Another request for the same question was answered first.
    HedgedAway,
}

/// The classes of failed exchanges, by whether a retry can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureClass {
    /// The server or the network failed; asking again may help.
    Temporary,
    /// The server limits the rate; asking again later helps.
    Limited,
    /// The server refuses; asking the same question again does not help until a person changes something.
    Refusal,
}

impl ExchangeOutcome {
    /// Returns the outcome of an exchange that the server reports as failed with `status`, with the pause `wait` it
    /// asked for and its message `why`; `quota` is true if it reports an exhausted quota.
    pub fn of_status(status: u16, wait: Option<Duration>, why: String, quota: bool) -> Self {
        match status {
            402 => Self::Quota(status, why),
            429 if quota => Self::Quota(status, why),
            429 => Self::RateLimited(wait, why),
            500.. => Self::Server(status, wait, why),
            _ => Self::Refused(status, why),
        }
    }

    /// Returns the outcome's name in metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Timeout => "timeout",
            Self::Connection(_) | Self::Closed(_) | Self::BrokeOff(_) => "connection",
            Self::Malformed(_) => "malformed",
            Self::RateLimited(..) => "rate_limited",
            Self::Quota(..) => "quota",
            Self::Filtered(_) => "filtered",
            Self::OtherModel(..) => "other_model",
            Self::Refused(300..=399, _) => "http_3xx",
            Self::Refused(..) | Self::Field(..=499, ..) => "http_4xx",
            Self::Server(..) | Self::Field(..) => "http_5xx",
            Self::HedgedAway => "hedged_away",
        }
    }

    /// All names in metrics.
    pub const NAMES: [&str; 12] = [
        "ok",
        "timeout",
        "connection",
        "malformed",
        "rate_limited",
        "quota",
        "filtered",
        "other_model",
        "http_3xx",
        "http_4xx",
        "http_5xx",
        "hedged_away",
    ];

    /// Returns the class of the failure, which determines whether the request is retried.
    pub fn class(&self) -> FailureClass {
        match self {
            Self::RateLimited(..) => FailureClass::Limited,
            Self::Refused(408 | 409 | 425, _) => FailureClass::Temporary,
            Self::Server(500, _, why) if is_too_long(why) => FailureClass::Refusal,
            // Not implemented: the server will not change by itself.
            Self::Server(501 | 505, ..) | Self::Refused(..) | Self::Field(..) | Self::Quota(..) => {
                FailureClass::Refusal
            }
            Self::Filtered(_) | Self::OtherModel(..) => FailureClass::Refusal,
            Self::Ok | Self::HedgedAway | Self::Timeout | Self::Malformed(_) => FailureClass::Temporary,
            Self::Connection(_) | Self::Closed(_) | Self::BrokeOff(_) | Self::Server(..) => FailureClass::Temporary,
        }
    }

    /// Returns whether the outcome means that the server refuses this question, rather than all questions of this
    /// client.
    pub fn refuses_this_question(&self) -> bool {
        let about = [400, 413, 414, 422, 431, 451];
        match self {
            Self::Refused(status, _) | Self::Field(status, ..) => about.contains(status),
            Self::Server(500, _, why) => is_too_long(why),
            outcome => matches!(outcome, Self::Filtered(_)),
        }
    }

    /// Returns whether the circuit breaker counts the exchange as a success: the server is reachable and works.
    pub fn alive(&self) -> bool {
        match self {
            Self::Ok | Self::HedgedAway => true,
            Self::Timeout | Self::Malformed(_) | Self::Server(..) => false,
            Self::Connection(_) | Self::Closed(_) | Self::BrokeOff(_) => false,
            Self::RateLimited(..) | Self::Quota(..) | Self::Refused(..) | Self::Field(..) => true,
            Self::Filtered(_) | Self::OtherModel(..) => true,
        }
    }

    /// Returns the pause that the server asked for.
    pub fn wait(&self) -> Option<Duration> {
        match self {
            Self::RateLimited(wait, _) | Self::Server(_, wait, _) => *wait,
            _ => None,
        }
    }

    /// Describes the outcome, with the server's message and the setting to check.
    pub fn words(&self) -> String {
        match self {
            Self::Ok => "answered".into(),
            Self::Timeout => "did not answer within labeler.remote.timeout_s".into(),
            Self::Connection(why) => format!("could not be reached: {why}"),
            Self::BrokeOff(why) => format!("did not finish its answer: {why}"),
            Self::Closed(why) => format!("closed the connection without an answer: {why}"),
            Self::Malformed(why) => format!("sent an answer that cannot be read: {why}"),
            Self::RateLimited(_, why) => format!("limits the rate of requests ({})", with("429", why)),
            Self::Quota(status, why) => format!(
                "has no quota left ({}); add credit to the account, or change labeler.remote",
                with(&status.to_string(), why)
            ),
            Self::Refused(status @ (401 | 403), why) => format!(
                "refused the key ({}); check the variable that labeler.remote.api_key_env names",
                with(&status.to_string(), why)
            ),
            Self::Refused(404, why) => {
                format!("knows no such address or model ({}); check labeler.remote.url and model", with("404", why))
            }
            Self::Refused(status @ 300..=399, target) => {
                format!(
                    "redirects to {target} (status {status}); redirects are not followed, since they would take prompts and the API key to an address that is not configured; if that address is right, set labeler.remote.url to it"
                )
            }
            Self::Refused(status, why) | Self::Field(status, why, _) => {
                format!("refused the request ({})", with(&status.to_string(), why))
            }
            Self::Filtered(why) => format!("withheld the answer ({why})"),
            Self::OtherModel(was, is) => format!(
                "answers as model {is:?} now, and answered as {was:?} before; restore that model, or set labeler.remote.any_model = true to accept any model"
            ),
            Self::Server(status, _, why) => format!("failed ({})", with(&status.to_string(), why)),
            Self::HedgedAway => "was superseded by another request".into(),
        }
    }
}

/// Returns whether an error message says that a prompt exceeds the model's context; some servers send it with status
/// 500.
pub(super) fn is_too_long(sentence: &str) -> bool {
    let sentence = sentence.to_lowercase();
    ["context length", "context size", "context window", "model length", "prompt is too long", "input is too long"]
        .iter()
        .any(|words| sentence.contains(words))
}

fn with(status: &str, sentence: &str) -> String {
    if sentence.is_empty() { status.to_owned() } else { format!("{status}: {sentence}") }
}

/// Returns the pause before try number `attempt` (the first retry is 1): the pause that the server asked for, plus up
/// to `base`·2^(attempt−1), at most `most`, scaled by `uniform` in [0, 1) so that many clients do not retry at the same
/// time.
pub fn pause(outcome: &ExchangeOutcome, attempt: u32, base: Duration, most: Duration, uniform: f64) -> Duration {
    let ceiling = base.saturating_mul(1 << (attempt.max(1) - 1).min(16)).min(most);
    outcome.wait().unwrap_or_default() + ceiling.mul_f64(uniform)
}

/// Parses the pause that a server asks for: `retry-after-ms`, or `retry-after` as seconds or as an HTTP date, which is
/// compared with `now`. More than a day is reduced to a day.
pub fn retry_after(seconds: Option<&str>, milliseconds: Option<&str>, now: SystemTime) -> Option<Duration> {
    const MAX_SECONDS: f64 = 86_400.0;
    let bounded = |s: f64| (s >= 0.0).then(|| Duration::from_secs_f64(s.min(MAX_SECONDS)));
    if let Some(ms) = milliseconds.and_then(|text| text.trim().parse::<f64>().ok()) {
        return bounded(ms / 1000.0);
    }
    let text = seconds?.trim();
    if let Ok(s) = text.parse::<f64>() {
        return bounded(s);
    }
    let at = httpdate::parse_http_date(text).ok()?;
    bounded(at.duration_since(now).unwrap_or_default().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_limit_and_include_the_servers_pause() {
        let (base, most) = (Duration::from_millis(500), Duration::from_secs(8));
        let pauses: Vec<u128> =
            (1..8).map(|attempt| pause(&ExchangeOutcome::Timeout, attempt, base, most, 1.0).as_millis()).collect();
        assert_eq!(pauses, [500, 1000, 2000, 4000, 8000, 8000, 8000]);
        assert_eq!(pause(&ExchangeOutcome::Timeout, 3, base, most, 0.25).as_millis(), 500);
        let limited = ExchangeOutcome::RateLimited(Some(Duration::from_secs(45)), String::new());
        assert_eq!(pause(&limited, 1, base, most, 0.5).as_millis(), 45_250, "the server's pause is not shortened");
    }

    #[test]
    fn a_too_long_prompt_is_a_refusal_of_this_question_for_every_status_that_reports_it() {
        for (status, why, about) in [
            (500, "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens", true),
            (500, "the request exceeds the available context size", true),
            (500, "out of memory", false),
            (503, "This model's maximum context length is being measured", false),
        ] {
            let outcome = ExchangeOutcome::Server(status, None, why.into());
            let refuses = outcome.class() == FailureClass::Refusal;
            assert_eq!((outcome.refuses_this_question(), refuses), (about, about), "{status} {why}");
        }
    }

    #[test]
    fn retry_after_is_read_as_seconds_date_and_milliseconds() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_770);
        let read = |seconds: &str| retry_after(Some(seconds), None, now);
        assert_eq!(read("7"), Some(Duration::from_secs(7)));
        assert_eq!(read(" 1.5 "), Some(Duration::from_millis(1500)));
        assert_eq!(read("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::from_secs(7)));
        assert_eq!(read("Sun, 06 Nov 1994 08:00:00 GMT"), Some(Duration::ZERO));
        assert_eq!((read("soon"), read("-1"), read("1e9")), (None, None, Some(Duration::from_secs(86_400))));
        assert_eq!(retry_after(Some("7"), Some("250"), now), Some(Duration::from_millis(250)));
        assert_eq!(retry_after(None, None, now), None);
    }

    #[test]
    fn failures_are_classified_by_whether_asking_again_may_help() {
        let none = String::new;
        for (outcome, class) in [
            (ExchangeOutcome::Timeout, FailureClass::Temporary),
            (ExchangeOutcome::Server(503, None, none()), FailureClass::Temporary),
            (ExchangeOutcome::Server(501, None, none()), FailureClass::Refusal),
            (ExchangeOutcome::RateLimited(None, none()), FailureClass::Limited),
            (ExchangeOutcome::Malformed("empty".into()), FailureClass::Temporary),
            (ExchangeOutcome::Quota(429, none()), FailureClass::Refusal),
            (ExchangeOutcome::Refused(400, none()), FailureClass::Refusal),
            (ExchangeOutcome::Refused(401, none()), FailureClass::Refusal),
            (ExchangeOutcome::Refused(307, none()), FailureClass::Refusal),
            (ExchangeOutcome::OtherModel("a".into(), "b".into()), FailureClass::Refusal),
            (ExchangeOutcome::Refused(408, none()), FailureClass::Temporary),
        ] {
            assert_eq!(outcome.class(), class, "{outcome:?}");
            assert!(ExchangeOutcome::NAMES.contains(&outcome.name()));
        }
    }
}
