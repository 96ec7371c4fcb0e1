//! Endurance tests of the complete program: random kills, faults, replays, a soak test, and misbehaving judges. Without
//! arguments, runs a short round of each in a release build, and nothing in a debug build.

mod faults;
mod judges;
mod kills;
#[path = "../suite/mock_judge.rs"]
#[allow(dead_code)]
mod mock_judge;
mod replays;
mod run;
mod soak;
#[path = "../suite/zoo/table.rs"]
#[allow(dead_code)]
mod zoo;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// cargo test --release --test endurance -- COMMAND …
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Option<Trial>,
}

#[derive(Subcommand)]
enum Trial {
    /// Kills one long run with SIGKILL at random instants, resumes it each time, and compares it with an uninterrupted
    /// run.
    Kills {
        /// Number of kills.
        #[arg(long, default_value_t = 10)]
        count: u32,
        /// Seed of the instants.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Injects faults at every named point, at random moments and of random kinds.
    Faults {
        /// Number of faults.
        #[arg(long, default_value_t = 34)]
        count: u32,
        /// Seed of the moments and kinds.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Replays asynchronous runs from their journals.
    Replays {
        /// Number of replays of the run.
        #[arg(long, default_value_t = 3)]
        count: u32,
        /// Learner steps of the run.
        #[arg(long, default_value_t = 20)]
        steps: u64,
    },
    /// Runs with a judge that misbehaves at random, like the judges of docs/judges.md, and compares the counts.
    Judges {
        /// Approximate number of questions.
        #[arg(long, default_value_t = 300)]
        questions: u64,
        /// Seed of the behaviours.
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },
    /// Runs the offline configuration for a long time and watches memory, handles, threads and the label cache.
    Soak {
        /// Duration in minutes.
        #[arg(long, default_value_t = 60.0)]
        minutes: f64,
    },
}

fn main() -> ExitCode {
    // `cargo test NAME` passes NAME to every test program; no trial has such a name.
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let known = ["kills", "faults", "replays", "judges", "soak", "help", "--help", "-h"];
    let trials = match arguments.first() {
        None if cfg!(debug_assertions) => {
            println!("skipped: the endurance trials are slow in a debug build; cargo test --release runs them");
            return ExitCode::SUCCESS;
        }
        None => vec![
            Trial::Kills { count: 10, seed: 1 },
            Trial::Faults { count: 34, seed: 1 },
            Trial::Replays { count: 3, steps: 20 },
            Trial::Judges { questions: 300, seed: 1 },
        ],
        Some(first) if known.contains(&first.as_str()) => Cli::parse().command.into_iter().collect(),
        Some(_) => return ExitCode::SUCCESS,
    };
    for trial in trials {
        let result = match trial {
            Trial::Kills { count, seed } => kills::trial(count, seed),
            Trial::Faults { count, seed } => faults::trial(count, seed),
            Trial::Replays { count, steps } => replays::trial(count, steps),
            Trial::Judges { questions, seed } => judges::trial(questions, seed),
            Trial::Soak { minutes } => soak::trial(minutes),
        };
        match result {
            Ok(text) => println!("{text}"),
            Err(error) => {
                eprintln!("failed: {error:#}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}
