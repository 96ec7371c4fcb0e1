//! Records whether a judge answers questions at all, which distinguishes a question that cannot be answered from a judge that
//! answers none.

use std::time::Duration;

use super::wire::Request;

/// Answers and failures of one judge. The clock is passed in.
#[derive(Default)]
pub struct Evidence {
    /// A short question that the judge has answered.
    control: Option<Request>,
    /// When the latest question was sent that was answered.
    answered: Option<Duration>,
    /// When the control question was last sent in vain.
    in_vain: Option<Duration>,
    /// The model of the first answer, by the name that the server reported.
    model: Option<String>,
    /// Whether any answer had log-probabilities, and how many had none before.
    listed: bool,
    unlisted: u32,
}

impl Evidence {
    /// Returns whether the judge answers questions that were sent at `since` or later; `None` if that is not known.
    pub fn of(&self, since: Duration) -> Option<bool> {
        let after = |sent: Option<Duration>| sent.is_some_and(|sent| sent >= since);
        if after(self.answered) { Some(true) } else { after(self.in_vain).then_some(false) }
    }

    /// Notes that `request`, sent at `sent`, was answered.
    pub fn answered(&mut self, request: &Request, sent: Duration) {
        self.answered = self.answered.max(Some(sent));
        if self.control.as_ref().is_none_or(|known| request.prompt.len() < known.prompt.len()) {
            self.control = Some(Request { max_tokens: 1, ..request.clone() });
        }
    }

    /// Notes that the control question was sent at `sent` and not answered.
    pub fn asked_in_vain(&mut self, sent: Duration) {
        self.in_vain = self.in_vain.max(Some(sent));
    }

    /// Whether any question was answered.
    pub fn has_answered(&self) -> bool {
        self.answered.is_some()
    }

    /// Returns the question that shows whether the judge answers any, once it has answered one: the shortest so far.
    pub fn control(&self) -> Option<Request> {
        self.control.clone()
    }

    /// Notes whether an answer to a question for log-probabilities had some. Returns whether the answer counts: one without
    /// them counts only from the third on, if no answer ever had any, so that an odd one does not change how the judge is
    /// asked.
    pub fn counts(&mut self, has_logprobs: bool) -> bool {
        /// Answers without log-probabilities that show that a server offers none.
        const TELLING: u32 = 3;
        if has_logprobs {
            self.listed = true;
        } else {
            self.unlisted = self.unlisted.saturating_add(1);
        }
        has_logprobs || (!self.listed && self.unlisted >= TELLING)
    }

    /// Returns the model of the first answer, if there was one that named its model.
    pub fn model(&self) -> Option<String> {
        self.model.clone()
    }

    /// Returns the model of the first answer, which is `model` if there was none before.
    pub fn first_model(&mut self, model: &str) -> String {
        self.model.get_or_insert_with(|| model.to_owned()).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_odd_answer_without_log_probabilities_does_not_show_that_a_server_offers_none() {
        let mut none = Evidence::default();
        assert_eq!([false; 4].map(|has| none.counts(has)), [false, false, true, true]);
        let mut some = Evidence::default();
        assert_eq!(
            [false, true, false, false, false, false].map(|has| some.counts(has)),
            [false, true, false, false, false, false]
        );
    }

    #[test]
    fn only_questions_that_were_sent_later_tell_whether_the_judge_answers() {
        let at = Duration::from_secs;
        let request = |prompt: &str| Request::vote(prompt, 0);
        let mut evidence = Evidence::default();
        assert_eq!((evidence.of(at(0)), evidence.control()), (None, None));
        evidence.answered(&request("a long question"), at(5));
        assert_eq!(
            (evidence.of(at(5)), evidence.of(at(6))),
            (Some(true), None),
            "an answer tells nothing of later times"
        );
        evidence.asked_in_vain(at(7));
        assert_eq!((evidence.of(at(5)), evidence.of(at(6)), evidence.of(at(8))), (Some(true), Some(false), None));
        evidence.answered(&request("short"), at(9));
        evidence.answered(&request("another long one"), at(8));
        assert_eq!(evidence.of(at(9)), Some(true), "answers come in any order");
        let control = evidence.control().unwrap();
        assert_eq!((control.prompt.as_str(), control.max_tokens), ("short", 1));
        assert_eq!((evidence.first_model("a"), evidence.first_model("b")), ("a".to_owned(), "a".to_owned()));
    }
}
