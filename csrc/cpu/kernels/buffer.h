// Scratch memory.
#pragma once

#include "../kernels.h"

namespace {

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_((T*)dlvae::allocate(count * (int64_t)sizeof(T))) {}
  ~Buffer() { dlvae::release(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

}  // namespace
