// The two passes over a slice of logits that PyTorch would make in six to ten: the row sums of the forward pass and the
// gradient of the backward pass. Everything else of kernels/logprob.py is matrix products and belongs to cuBLAS; the
// formulas are at the top of that file, and `merge_slice` and `slice_gradient` there are the same functions in PyTorch.
//
// Both are bound by memory. A warp's 32 threads read 32 neighbouring floats, and every thread has four independent loads
// under way before it uses the first, so neither the number of columns nor the address of a row has to be a multiple of
// anything. Rows are in grid x, the only dimension that may exceed 65,535; offsets into the slice are 64 bits wide.
// NVRTC compiles this file at first use: no includes, and so no INFINITY, no FLT_MAX and no bfloat16 type.

#define THREADS 256
#define LOADS 4
#define LOWEST -3.402823466e38f  // the running maximum of nothing: unlike -inf it can be subtracted from -inf

struct Sums { float top, total, moment; };  // m = max z, sum of exp(z - m), sum of exp(z - m) (z - m)

// What `a` has summed, had its maximum been `top`. An empty `a` has nothing to rescale (and 0 * -inf would be nan).
__device__ Sums rescale(Sums a, float top) {
  if (a.total == 0) return {top, 0, 0};
  float shift = a.top - top, scale = expf(shift);
  return {top, scale * a.total, scale * (a.moment + shift * a.total)};
}

// One block a row: state (R, 4) = (top, total, moment, logit of the target) takes in z (R, columns), whose first column
// is number `start` of the vocabulary. A nan stays in its row: fmaxf passes over it, the sums don't.
extern "C" __global__ void merge_slice(const float* z, const long long* targets, float* state, int columns, int start,
                                       double inverse_temperature) {
  __shared__ Sums part[THREADS];
  const float* row = z + (long long)blockIdx.x * columns;
  const float scale = inverse_temperature;
  Sums own = {LOWEST, 0, 0};
  for (int first = threadIdx.x; first < columns; first += LOADS * THREADS) {
    float x[LOADS], top = own.top;
    for (int k = 0; k < LOADS; k++) x[k] = first + k * THREADS < columns ? scale * row[first + k * THREADS] : LOWEST;
    for (int k = 0; k < LOADS; k++) top = fmaxf(top, x[k]);
    own = rescale(own, top);
    for (int k = 0; k < LOADS && first + k * THREADS < columns; k++) {
      float e = expf(x[k] - top);
      own.total += e;
      own.moment += e > 0 ? e * (x[k] - top) : e;  // 0 * -inf would be nan
    }
  }
  part[threadIdx.x] = own;
  for (int half = THREADS / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      Sums a = part[threadIdx.x], b = part[threadIdx.x + half];
      float top = fmaxf(a.top, b.top);
      a = rescale(a, top), b = rescale(b, top);
      part[threadIdx.x] = {top, a.total + b.total, a.moment + b.moment};
    }
  }
  if (threadIdx.x == 0) {  // the thread that wrote part[0]
    float* s = state + 4ll * blockIdx.x;
    long long column = targets[blockIdx.x] - start;
    float top = fmaxf(s[0], part[0].top);
    Sums before = rescale({s[0], s[1], s[2]}, top), now = rescale(part[0], top);
    s[0] = top, s[1] = before.total + now.total, s[2] = before.moment + now.moment;
    if (column >= 0 && column < columns) s[3] = scale * row[column];
  }
}

// g (R, columns), fp32 or bf16, of z (R, columns), which it may overwrite. rows (R, 5) = (top, log total, entropy,
// gradients of log-prob and entropy). Blocks 0 ... chunks - 1 share the first row, and so on.
extern "C" __global__ void slice_gradient(const float* z, const long long* targets, const float* rows, void* g, int columns,
                                          int start, double inverse_temperature, int bf16) {
  const int chunks = (columns + LOADS * THREADS - 1) / (LOADS * THREADS), row = blockIdx.x / chunks;
  const int first = blockIdx.x % chunks * LOADS * THREADS + threadIdx.x;
  const float *s = rows + 5ll * row, scale = inverse_temperature;
  const float top = s[0], log_total = s[1], entropy = s[2], by_logprob = s[3], by_entropy = s[4];
  const long long target = targets[row] - start, offset = (long long)row * columns;
  float x[LOADS];
  for (int k = 0; k < LOADS; k++) x[k] = first + k * THREADS < columns ? scale * z[offset + first + k * THREADS] : 0;
  for (int k = 0; k < LOADS && first + k * THREADS < columns; k++) {
    const int column = first + k * THREADS;
    float logp = x[k] - top - log_total, p = expf(logp);  // two subtractions: their sum would round at large offsets
    float d = p > 0 ? p * (by_logprob + by_entropy * (logp + entropy)) : p;
    d = scale * ((column == target ? by_logprob : 0) - d);
    if (!bf16) {
      ((float*)g)[offset + column] = d;
    } else {  // round to nearest, ties to even; a nan keeps a bit of its mantissa
      unsigned bits = __float_as_uint(d);
      ((unsigned short*)g)[offset + column] = d != d ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
  }
}
