//! Which failures are worth another try, and when.

use std::time::Duration;

/// How an HTTP exchange ended, as it is counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// An answer that could be read.
    Ok,
    /// No answer in time.
    Timeout,
    /// No connection, or one that broke off.
    Connection(String),
    /// An answer that could not be read.
    Malformed(String),
    /// 429, with what the server said of when to come back.
    RateLimited(Option<Duration>),
    /// Another status from 400 to 499, with the beginning of the body; or one from 300 to 399, with the address that the
    /// server redirects to. No redirect is followed.
    Refused(u16, String),
    /// A status from 500 up.
    Server(u16),
    /// Its twin answered first.
    HedgedAway,
}

impl Outcome {
    /// As metrics name it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Timeout => "timeout",
            Self::Connection(_) => "connection",
            Self::Malformed(_) => "malformed",
            Self::RateLimited(_) => "rate_limited",
            Self::Refused(300..=399, _) => "http_3xx",
            Self::Refused(..) => "http_4xx",
            Self::Server(_) => "http_5xx",
            Self::HedgedAway => "hedged_away",
        }
    }

    /// All names.
    pub const NAMES: [&str; 9] =
        ["ok", "timeout", "connection", "malformed", "rate_limited", "http_3xx", "http_4xx", "http_5xx", "hedged_away"];

    /// Whether asking again may help.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Timeout | Self::Connection(_) | Self::Malformed(_) | Self::RateLimited(_) | Self::Server(_) => true,
            Self::Refused(status, _) => matches!(status, 408 | 409),
            Self::Ok | Self::HedgedAway => false,
        }
    }

    /// Whether the server is there and working: what a circuit breaker counts as a success.
    pub fn alive(&self) -> bool {
        matches!(self, Self::Ok | Self::Refused(..) | Self::RateLimited(_) | Self::HedgedAway)
    }

    /// In words.
    pub fn words(&self) -> String {
        match self {
            Self::Ok => "answered".into(),
            Self::Timeout => "did not answer in time".into(),
            Self::Connection(why) => format!("could not be reached: {why}"),
            Self::Malformed(why) => format!("sent an answer that cannot be read: {why}"),
            Self::RateLimited(_) => "limits the rate of requests (429)".into(),
            Self::Refused(status @ (401 | 403), _) => {
                format!("refused the key ({status}); check the variable that labeler.remote.api_key_env names")
            }
            Self::Refused(status @ 300..=399, target) => {
                format!(
                    "redirects to {target} (status {status}); redirects are not followed, since they would take prompts and the API key to an address that is not configured; if that address is right, set labeler.remote.url to it"
                )
            }
            Self::Refused(404, body) => {
                format!("knows no such address or model (404: {body}); check labeler.remote.url and model")
            }
            Self::Refused(status, body) => format!("refused the request ({status}: {body})"),
            Self::Server(status) => format!("failed ({status})"),
            Self::HedgedAway => "was overtaken".into(),
        }
    }
}

/// How long to wait before try number `attempt` (the first retry is 1): up to `base`·2^(attempt−1), at most `most`,
/// drawn by `uniform` in [0, 1) so that many clients do not come back at once; never before the server asked for.
pub fn pause(outcome: &Outcome, attempt: u32, base: Duration, most: Duration, uniform: f64) -> Duration {
    let ceiling = base.saturating_mul(1 << (attempt - 1).min(16)).min(most);
    let drawn = ceiling.mul_f64(uniform);
    match outcome {
        Outcome::RateLimited(Some(asked)) => (*asked).min(most) + drawn,
        _ => drawn,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_bound_and_heed_the_server() {
        let (base, most) = (Duration::from_millis(500), Duration::from_secs(8));
        let pauses: Vec<u128> =
            (1..8).map(|attempt| pause(&Outcome::Timeout, attempt, base, most, 1.0).as_millis()).collect();
        assert_eq!(pauses, [500, 1000, 2000, 4000, 8000, 8000, 8000]);
        assert_eq!(pause(&Outcome::Timeout, 3, base, most, 0.25).as_millis(), 500);
        let limited = Outcome::RateLimited(Some(Duration::from_secs(3)));
        assert_eq!(pause(&limited, 1, base, most, 0.5).as_millis(), 3250);
    }

    #[test]
    fn only_what_may_pass_is_tried_again() {
        for (outcome, again) in [
            (Outcome::Timeout, true),
            (Outcome::Server(503), true),
            (Outcome::RateLimited(None), true),
            (Outcome::Malformed("empty".into()), true),
            (Outcome::Refused(307, String::new()), false),
            (Outcome::Refused(400, String::new()), false),
            (Outcome::Refused(401, String::new()), false),
            (Outcome::Refused(408, String::new()), true),
        ] {
            assert_eq!(outcome.may_pass(), again, "{outcome:?}");
            assert!(Outcome::NAMES.contains(&outcome.name()));
        }
    }
}
