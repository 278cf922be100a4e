// The experts' SwiGLU and its derivatives, sixteen inner activations at a time.
#ifndef CPU_KERNELS_SWIGLU_H_
#define CPU_KERNELS_SWIGLU_H_

#include "vec.h"

namespace cpu_kernels::CPU_KERNELS_ISA {

constexpr float kSwigluAlpha = 1.702f;

inline Vec swiglu_sigmoid(Vec gate) { return div(splat(1), add(splat(1), exp(mul(splat(-kSwigluAlpha), gate)))); }

// gate * sigmoid(1.702 gate) * (linear + 1), gate clamped above only, linear both ways.
inline Vec swiglu(Vec gate, Vec linear, float limit) {
  gate = min(splat(limit), gate);
  linear = min(splat(limit), max(splat(-limit), linear));
  return mul(mul(gate, swiglu_sigmoid(gate)), add(linear, splat(1)));
}

// The same value, and its derivatives by gate and linear: 0 where these are clamped.
struct SwigluGradient {
  Vec value, by_gate, by_linear;
};

inline SwigluGradient swiglu_gradient(Vec gate, Vec linear, float limit) {
  const Vec most = splat(limit), least = splat(-limit), one = splat(1);
  const Vec clamped = min(most, gate), more = add(min(most, max(least, linear)), one), s = swiglu_sigmoid(clamped);
  // d(g s(1.702 g))/dg = s + 1.702 g s (1 - s)
  const Vec swish = mul(clamped, s), slope = add(s, mul(mul(splat(kSwigluAlpha), swish), sub(one, s)));
  const Vec by_linear = unless_greater(linear, most, unless_greater(least, linear, swish));
  return {mul(swish, more), unless_greater(gate, most, mul(slope, more)), by_linear};
}

}  // namespace cpu_kernels::CPU_KERNELS_ISA

#endif  // CPU_KERNELS_SWIGLU_H_
