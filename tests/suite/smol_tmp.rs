use candle_core::{Device, Tensor, Var};
use preceptor::algo::{rloo::Rloo, *};
use preceptor::generate::sampler::Sampling;
use preceptor::generate::{Fixed, Request, generate};
use preceptor::model::{Llama, Pack, Weights};
use preceptor::ops::*;
use std::sync::Arc;
use std::time::Instant;
fn env(n: &str, d: f64) -> f64 {
    std::env::var(n).ok().map_or(d, |v| v.parse().unwrap())
}
#[test]
fn smol() {
    let p = std::env::var("SMOL").unwrap();
    let (config, weights) = Weights::from_gguf(p.as_ref(), &Device::Cpu).unwrap();
    let reference = Llama::new(&config, &weights).unwrap();
    let j: serde_json::Value = serde_json::from_str(&std::fs::read_to_string("/tmp/prompts.json").unwrap()).unwrap();
    let ids = |v: &serde_json::Value| -> Vec<u32> {
        v.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
    };
    let blank = ids(&j["blank"]);
    let prompts: Vec<Vec<u32>> = j["prompts"].as_array().unwrap().iter().map(ids).filter(|p| p.len() < 160).collect();
    let (lr, k, new, steps, b, norm) = (
        env("LR", 2e-5),
        env("K", 8.) as usize,
        env("NEW", 24.) as usize,
        env("STEPS", 10.) as usize,
        env("B", 4.) as usize,
        env("NORM", 0.),
    );
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    pool.install(|| {
        let params: Vec<(String, Var)> =
            weights.0.iter().map(|(k, v)| (k.clone(), Var::from_tensor(&v.copy().unwrap()).unwrap())).collect();
        let tm =
            Llama::new(&config, &Weights(params.iter().map(|(k, v)| (k.clone(), v.as_tensor().clone())).collect()))
                .unwrap();
        let mut g = Gradients::new(&params).unwrap();
        let mut opt = AdamW::new(params, AdamWConfig::default()).unwrap();
        let algo = Rloo { kl_coef: env("BETA", 0.05), correction: Correction::Truncated { limit: 2.0 } };
        let mut scale = preceptor::rollout::RewardScale::default();
        let arc = Arc::new(tm.clone());
        for s in 0..steps {
            let t = Instant::now();
            let requests: Vec<Request> = (0..b)
                .map(|i| {
                    let q = s * b + i;
                    Request {
                        prompt: &prompts[q % prompts.len()],
                        seeds: (0..k)
                            .map(|c| preceptor::seed::completion(env("SEED", 0.) as u64, q as u64, c))
                            .collect(),
                    }
                })
                .collect();
            let sampling = Sampling { temperature: 0.9, max_new_tokens: new, eos: vec![2] };
            let out = generate(&mut Fixed(arc.clone()), &requests, &sampling).unwrap();
            let tg = t.elapsed();
            let (mut sc, mut len, mut kl, mut n) = (0.0, 0.0, 0.0, 0.0);
            let mut text = vec![];
            for (o, r) in out.iter().zip(&requests) {
                let ids: Vec<&[u32]> = o.iter().map(|o| o.ids.as_slice()).collect();
                let pack = Pack::new(r.prompt, &ids);
                let h = reference.predicting(&pack).unwrap();
                let logits = reference.logits(&h).unwrap();
                let c = pack.split(&token_logprobs(&logits, &pack.targets, 1.0).unwrap().0.to_vec1().unwrap());
                let rf = pack.split(&token_logprobs(&logits, &pack.targets, 0.9).unwrap().0.to_vec1().unwrap());
                drop(logits);
                let bp = Pack::new(&blank, &ids);
                let u = bp.split(&reference.logprobs(&bp, 1.0).unwrap().0.to_vec1().unwrap());
                let scores: Vec<f64> = c
                    .iter()
                    .zip(&u)
                    .map(|(c, u)| {
                        (c.iter().sum::<f32>() - u.iter().sum::<f32>()) as f64
                            / if norm > 0.0 { c.len() as f64 } else { 1.0 }
                    })
                    .collect();
                for x in &scores {
                    scale.add(*x)
                }
                let rewards: Vec<f64> = scores
                    .iter()
                    .map(|x| ((x - scale.mean) / scale.std()).clamp(-5., 5.) - env("LP", 0.0) * 0.0)
                    .collect();
                let (lp, _) = {
                    let h = tm.predicting(&pack).unwrap();
                    linear_logprobs(&h, tm.head(), &pack.targets, 0.9).unwrap()
                };
                let pol = pack.split(&lp.to_vec1().unwrap());
                let beh: Vec<Vec<f32>> = o.iter().map(|o| o.logprobs.clone()).collect();
                let loss = algo.loss(&GroupView {
                    rewards: &rewards,
                    behaviour: &beh,
                    reference: &rf,
                    policy: &pol,
                    values: &[],
                });
                let sl = Tensor::from_vec(loss.d_policy.concat(), lp.dims(), &Device::Cpu).unwrap();
                let mut st = (lp * sl).unwrap().sum_all().unwrap().backward().unwrap();
                g.add(&mut st).unwrap();
                sc += scores.iter().sum::<f64>();
                len += o.iter().map(|o| o.ids.len() as f64).sum::<f64>();
                n += k as f64;
                kl += beh.iter().zip(&rf).map(|(a, b)| sequence_kl(a, b)).sum::<f64>();
                text.push(o[0].ids.clone());
            }
            let gn = g.global_norm().unwrap() / n;
            let warm = ((s + 1) as f64 / 3.0).min(1.0);
            opt.step(&g, lr * warm, (1.0 / gn).min(1.0) / n).unwrap();
            g.zero().unwrap();
            println!(
                "step {s} score {:.3} len {:.1} kl {:.3} gn {gn:.2} gen {tg:?} all {:?} ids {:?}",
                sc / n,
                len / n,
                kl / n,
                t.elapsed(),
                text[0]
            );
        }
    });
}
