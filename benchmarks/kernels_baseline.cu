// The historical baseline: a sparse depthwise convolution with one kernel launch per tap, a neighbour map and atomic adds.
//
// Written from the idea of generalised sparse convolution as MinkowskiEngine computes it: for each tap, the pairs of an
// existing input and an existing output site, and a sum over taps in global memory. Source of the idea: Choy et al., "4D
// Spatio-Temporal ConvNets", arXiv 1904.08755, section 3. float32 only, as there; no includes, compiled by NVRTC or nvcc.
//
// Shapes: M = N*V*s*s sites, x and y [M, C], weight [C, 49], neighbours [49, M]: the row in x that tap t of an output sees,
// or -1.

extern "C" __global__ void baseline_fill(const float* bias, float* y, int num_sites, int channels) {
  const long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index < static_cast<long long>(num_sites) * channels) y[index] = bias[index % channels];
}

// y[p] += weight[tap] * x[neighbours[tap][p]] over all sites p.
extern "C" __global__ void baseline_tap(const float* x, const float* weight, const int* neighbours, float* y, int tap,
                                        int num_sites, int channels) {
  const long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int site = index / channels, channel = index % channels;
  if (site >= num_sites) return;
  const int from = neighbours[static_cast<long long>(tap) * num_sites + site];
  if (from < 0) return;
  atomicAdd(y + index, weight[channel * 49 + tap] * x[static_cast<long long>(from) * channels + channel]);
}

// grad_x[neighbours[tap][p]] += weight[tap] * grad_y[p], and the tap's gradient: every site adds to the one sum of its channel.
extern "C" __global__ void baseline_tap_backward(const float* x, const float* grad_y, const float* weight, const int* neighbours,
                                                 float* grad_x, float* grad_weight, int tap, int num_sites, int channels) {
  const long long index = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int site = index / channels, channel = index % channels;
  if (site >= num_sites) return;
  const int from = neighbours[static_cast<long long>(tap) * num_sites + site];
  if (from < 0) return;
  const long long source = static_cast<long long>(from) * channels + channel;
  atomicAdd(grad_x + source, weight[channel * 49 + tap] * grad_y[index]);
  atomicAdd(grad_weight + channel * 49 + tap, x[source] * grad_y[index]);
}
