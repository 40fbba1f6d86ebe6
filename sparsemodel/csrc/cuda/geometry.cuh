// Sizes of a convolution call in the batch-innermost layout [C, H, W, B]; a linear layer is a
// 1x1 convolution of one pixel.
#pragma once

#include "common.cuh"

struct Geometry {
  int batch, in_channels, out_channels, in_h, in_w, out_h, out_w, kernel_h, kernel_w, stride_h,
      stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;

  __device__ int in_width() const { return in_channels / groups; }
  __device__ int row_length() const { return in_width() * kernel_h * kernel_w; }
  __device__ int outputs() const { return out_h * out_w * batch; }  // of one channel
  __device__ int inputs() const { return in_h * in_w * batch; }
  // The first input channel that an output channel reads.
  __device__ int first_channel(int out_channel) const {
    return out_channel / (out_channels / groups) * in_width();
  }
};

// `numbers` holds the sizes in the order of the struct.
__device__ inline Geometry read_geometry(const int* numbers) { return *(const Geometry*)numbers; }

// A column of a weight row: input channel inside the group, and the shift inside the window.
struct Tap { int channel, down, right; };

__device__ inline Tap tap_of(const Geometry& g, int column) {
  int across = column / g.kernel_w;
  return {across / g.kernel_h, across % g.kernel_h * g.dilation_h,
          column % g.kernel_w * g.dilation_w};
}

// A place of one channel: sample and the top left corner of its window in the input.
struct Window { int sample, top, left; };

__device__ inline Window window_of(const Geometry& g, int output) {
  int pixel = output / g.batch;
  return {output % g.batch, pixel / g.out_w * g.stride_h - g.pad_h,
          pixel % g.out_w * g.stride_w - g.pad_w};
}

// Where the input lies that a window sees through a tap of `channel`; -1 in the padding.
__device__ inline int64 input_at(const Geometry& g, const Window& w, int channel, int down,
                                 int right) {
  int row = w.top + down, column = w.left + right;
  if (row < 0 || row >= g.in_h || column < 0 || column >= g.in_w) return -1;
  return (((int64)channel * g.in_h + row) * g.in_w + column) * g.batch + w.sample;
}
