//! Arithmetic loops that the compiler vectorises, and the choice of the instruction set at run time.

/// Number of lanes of a running sum: enough independent chains to hide the latency of an addition.
pub(super) const LANES: usize = 16;

/// Defines a function that is compiled three times, for AVX-512, for AVX2 with FMA and for the baseline, and selected
/// at run time. The named constant is true in the body if FMA is available. The body must consist of plain loops over
/// slices.
macro_rules! vectorised {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<$fma:ident>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::extra_unused_type_parameters, clippy::too_many_arguments)]
            fn body<const $fma: bool>($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn wide($($arg: $ty),*) $(-> $ret)? {
                    body::<true>($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn widest($($arg: $ty),*) $(-> $ret)? {
                    body::<true>($($arg),*)
                }
                if std::arch::is_x86_feature_detected!("avx512f")
                    && std::arch::is_x86_feature_detected!("avx512bw")
                    && std::arch::is_x86_feature_detected!("avx512dq")
                    && std::arch::is_x86_feature_detected!("avx512vl")
                    && std::arch::is_x86_feature_detected!("fma")
                {
                    // SAFETY: the features were just detected, and a processor with AVX-512 has AVX2.
                    return unsafe { widest($($arg),*) };
                }
                if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
                    // SAFETY: both features were just detected.
                    return unsafe { wide($($arg),*) };
                }
            }
            body::<false>($($arg),*)
        }
    };
}
pub(super) use vectorised;

/// Computes `a·b + c`, with a single rounding if `FMA` is true.
#[inline(always)]
pub(super) fn fused<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// Computes `e^x` with a relative error of at most 3e-7. The result is 0 below the smallest normal number and the
/// largest finite power above 88.37; NaN stays NaN. Branch-free, so that a loop over it is vectorised.
#[inline(always)]
pub(super) fn exp<const FMA: bool>(x: f32) -> f32 {
    const LOWEST: f32 = -87.33;
    const HIGHEST: f32 = 88.37;
    /// The addition leaves the nearest integer in the low bits of the significand.
    const ROUND: f32 = 12_582_912.0;
    // Comparisons instead of `clamp` or `max`, which turn NaN into a number on some targets.
    let bounded = if x < LOWEST { LOWEST } else { x };
    let bounded = if bounded > HIGHEST { HIGHEST } else { bounded };
    let shifted = fused::<FMA>(bounded, std::f32::consts::LOG2_E, ROUND);
    let power = shifted - ROUND;
    let r = fused::<FMA>(power, -0.693_359_4, bounded);
    let r = fused::<FMA>(power, 2.121_944_4e-4, r);
    // Taylor series of degree seven; with |r| ≤ ln2/2 the remainder is less than 6e-9.
    let p = fused::<FMA>(1.0 / 5040.0, r, 1.0 / 720.0);
    let p = fused::<FMA>(p, r, 1.0 / 120.0);
    let p = fused::<FMA>(p, r, 1.0 / 24.0);
    let p = fused::<FMA>(p, r, 1.0 / 6.0);
    let p = fused::<FMA>(p, r, 0.5);
    let p = fused::<FMA>(p, r, 1.0);
    let p = fused::<FMA>(p, r, 1.0);
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(127).wrapping_shl(23));
    if x < LOWEST { 0.0 } else { p * scale }
}

/// Returns the sum of the lanes, added pairwise.
#[inline(always)]
pub(super) fn total(lanes: [f32; LANES]) -> f32 {
    let mut lanes = lanes;
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
        half /= 2;
    }
    lanes[0]
}

vectorised! {
/// Computes `Σ aᵢ·bᵢ`.
pub(super) fn dot<FMA>(a: &[f32], b: &[f32]) -> f32 {
    inline_dot::<FMA>(a, b)
}
}

/// Computes [`dot`] inline in a vectorised body.
#[inline(always)]
pub(super) fn inline_dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            lanes[i] = fused::<FMA>(a[i], b[i], lanes[i]);
        }
    }
    let mut rest = 0.0;
    for (a, b) in a_rest.iter().zip(b_rest) {
        rest += a * b;
    }
    total(lanes) + rest
}

/// Returns the largest value; −∞ for no values. NaN is ignored here and shows up in the sum that follows.
#[inline(always)]
pub(super) fn inline_max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    rest.iter().chain(&lanes).fold(f32::NEG_INFINITY, |a, &b| if b > a { b } else { a })
}

#[cfg(test)]
mod tests {
    use super::*;

    vectorised! {
    fn exp_all<FMA>(values: &mut [f32]) {
        for v in values.iter_mut() {
            *v = exp::<FMA>(*v);
        }
    }
    }

    #[test]
    fn exp_is_close_to_f64_over_the_normal_range() {
        let xs: Vec<f32> = (0..200_000).map(|i| -87.3 + i as f32 * (175.6 / 200_000.0)).collect();
        let mut wide = xs.clone();
        exp_all(&mut wide);
        for (x, got) in xs.iter().zip(wide) {
            let want = (*x as f64).exp();
            for got in [got, exp::<false>(*x)] {
                assert!(((got as f64 - want) / want).abs() < 3e-7, "exp({x}) = {got} against {want}");
            }
        }
    }

    #[test]
    fn exp_handles_extreme_values_and_nan() {
        assert_eq!(exp::<false>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<false>(-1e4), 0.0);
        assert_eq!(exp::<false>(0.0), 1.0);
        assert!(exp::<false>(f32::INFINITY) > 1e38);
        assert!(exp::<false>(f32::NAN).is_nan());
    }

    #[test]
    fn dot_and_max_include_the_remainder_of_a_chunk() {
        let a: Vec<f32> = (0..37).map(|i| i as f32).collect();
        assert_eq!(dot(&a, &a), (0..37).map(|i| (i * i) as f32).sum::<f32>());
        assert_eq!(inline_max(&a), 36.0);
        assert_eq!(inline_max(&[]), f32::NEG_INFINITY);
    }
}
