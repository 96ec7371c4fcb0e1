//! Record of whether a judge answers questions at all. It distinguishes a question that cannot be answered from a judge
//! that answers none.

use std::time::Duration;

use super::wire::Request;

/// Answers and failures of one judge. The clock is passed in.
#[derive(Default)]
pub struct Evidence {
    /// A short question that the judge has answered.
    control: Option<Request>,
    /// Send time of the latest question that was answered.
    answered: Option<Duration>,
    /// Send time of the latest control question that was not answered.
    unanswered: Option<Duration>,
    /// Model name that the server reported with its first answer.
    model: Option<String>,
    /// True if any answer had log-probabilities; `unlisted` counts the answers without.
    listed: bool,
    unlisted: u32,
}

impl Evidence {
    /// Returns whether the judge answers questions sent at `since` or later; `None` if that is not known.
    pub fn of(&self, since: Duration) -> Option<bool> {
        let after = |sent: Option<Duration>| sent.is_some_and(|sent| sent >= since);
        if after(self.answered) { Some(true) } else { after(self.unanswered).then_some(false) }
    }

    /// Records that `request`, sent at `sent`, was answered.
    pub fn answered(&mut self, request: &Request, sent: Duration) {
        self.answered = self.answered.max(Some(sent));
        if self.control.as_ref().is_none_or(|known| request.prompt.len() < known.prompt.len()) {
            self.control = Some(Request { max_tokens: 1, ..request.clone() });
        }
    }

    /// Records that the control question sent at `sent` was not answered.
    pub fn control_unanswered(&mut self, sent: Duration) {
        self.unanswered = self.unanswered.max(Some(sent));
    }

    /// Returns whether the judge has answered any question so far.
    pub fn has_answered(&self) -> bool {
        self.answered.is_some()
    }

    /// Returns the control question, the shortest one that the judge has answered, or `None` before the first answer.
    pub fn control(&self) -> Option<Request> {
        self.control.clone()
    }

    /// Records whether an answer to a request for log-probabilities had any. Returns whether the answer counts. Without
    /// log-probabilities it counts only from the third such answer on, and only if no answer ever had any, so that a
    /// single odd answer does not change how the judge is asked.
    pub fn counts(&mut self, has_logprobs: bool) -> bool {
        /// Number of answers without log-probabilities that show that a server offers none.
        const MIN_WITHOUT_LOGPROBS: u32 = 3;
        if has_logprobs {
            self.listed = true;
        } else {
            self.unlisted = self.unlisted.saturating_add(1);
        }
        has_logprobs || (!self.listed && self.unlisted >= MIN_WITHOUT_LOGPROBS)
    }

    /// Returns the model name of the first answer that named its model.
    pub fn model(&self) -> Option<String> {
        self.model.clone()
    }

    /// Returns the model name of the first answer, recording `model` if there was none before.
    pub fn first_model(&mut self, model: &str) -> String {
        self.model.get_or_insert_with(|| model.to_owned()).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_answer_without_log_probabilities_does_not_show_that_a_server_offers_none() {
        let mut none = Evidence::default();
        assert_eq!([false; 4].map(|has| none.counts(has)), [false, false, true, true]);
        let mut some = Evidence::default();
        assert_eq!(
            [false, true, false, false, false, false].map(|has| some.counts(has)),
            [false, true, false, false, false, false]
        );
    }

    #[test]
    fn only_questions_sent_later_show_whether_the_judge_answers() {
        let at = Duration::from_secs;
        let request = |prompt: &str| Request::vote(prompt, 0);
        let mut evidence = Evidence::default();
        assert_eq!((evidence.of(at(0)), evidence.control()), (None, None));
        evidence.answered(&request("a long question"), at(5));
        assert_eq!(
            (evidence.of(at(5)), evidence.of(at(6))),
            (Some(true), None),
            "an answer says nothing about later times"
        );
        evidence.control_unanswered(at(7));
        assert_eq!((evidence.of(at(5)), evidence.of(at(6)), evidence.of(at(8))), (Some(true), Some(false), None));
        evidence.answered(&request("short"), at(9));
        evidence.answered(&request("another long one"), at(8));
        assert_eq!(evidence.of(at(9)), Some(true), "answers arrive in any order");
        let control = evidence.control().unwrap();
        assert_eq!((control.prompt.as_str(), control.max_tokens), ("short", 1));
        assert_eq!((evidence.first_model("a"), evidence.first_model("b")), ("a".to_owned(), "a".to_owned()));
    }
}
