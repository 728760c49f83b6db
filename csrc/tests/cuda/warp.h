// Operations of a warp. Each lane provides its operands; the last lane to arrive computes the results of all.
#pragma once

#include <algorithm>
#include <cstdint>

#include "block.h"

namespace dlvae::emulator {

template <class T>
struct Exchanged {
  T value;
  int source;
  T result;
};

// Gives each lane's value to the lanes that name it. A missing lane gives poison.
template <class T>
T exchange(const char* name, uint32_t mask, T value, int source) {
  Exchanged<T> mine{value, source, poison<T>()};
  wait_for_lanes(
      name, mask,
      [](void* const* lanes, uint32_t present) {
        for (int i = 0; i < 32; ++i) {
          if ((present >> i & 1) == 0) continue;
          Exchanged<T>& one = *static_cast<Exchanged<T>*>(lanes[i]);
          if (present >> one.source & 1) one.result = static_cast<Exchanged<T>*>(lanes[one.source])->value;
        }
      },
      &mine);
  return mine.result;
}

template <class T, class Op>
struct Reduced {
  T value, result;
};

// Combines the values of all lanes from the lowest to the highest.
template <class T, class Op>
T reduce(const char* name, uint32_t mask, T value, Op) {
  Reduced<T, Op> mine{value, value};
  wait_for_lanes(
      name, mask,
      [](void* const* lanes, uint32_t present) {
        bool is_first = true;
        T sum{};
        for (int i = 0; i < 32; ++i) {
          if ((present >> i & 1) == 0) continue;
          const T one = static_cast<Reduced<T, Op>*>(lanes[i])->value;
          sum = is_first ? one : Op::of(sum, one);
          is_first = false;
        }
        for (int i = 0; i < 32; ++i) {
          if (present >> i & 1) static_cast<Reduced<T, Op>*>(lanes[i])->result = sum;
        }
      },
      &mine);
  return mine.result;
}

struct Add {
  template <class T>
  static T of(T a, T b) {
    return a + b;
  }
};
struct Min {
  template <class T>
  static T of(T a, T b) {
    return std::min(a, b);
  }
};
struct Max {
  template <class T>
  static T of(T a, T b) {
    return std::max(a, b);
  }
};
struct And {
  template <class T>
  static T of(T a, T b) {
    return a & b;
  }
};
struct Or {
  template <class T>
  static T of(T a, T b) {
    return a | b;
  }
};
struct Xor {
  template <class T>
  static T of(T a, T b) {
    return a ^ b;
  }
};

inline int lane() { return current->lane; }

}  // namespace dlvae::emulator

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int own = dlvae::emulator::lane();
  return dlvae::emulator::exchange("__shfl_sync", mask, value, (own & -width) | (source & (width - 1)));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int own = dlvae::emulator::lane(), source = own - static_cast<int>(delta);
  return dlvae::emulator::exchange("__shfl_up_sync", mask, value, source < (own & -width) ? own : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int own = dlvae::emulator::lane(), source = own + static_cast<int>(delta);
  return dlvae::emulator::exchange("__shfl_down_sync", mask, value, source > (own | (width - 1)) ? own : source);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int own = dlvae::emulator::lane(), source = own ^ bits;
  return dlvae::emulator::exchange("__shfl_xor_sync", mask, value, source > (own | (width - 1)) ? own : source);
}

inline void __syncwarp(unsigned mask = 0xffffffff) {
  dlvae::emulator::wait_for_lanes("__syncwarp", mask, [](void* const*, uint32_t) {}, nullptr);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned bit = predicate != 0 ? 1u << dlvae::emulator::lane() : 0;
  return dlvae::emulator::reduce("__ballot_sync", mask, bit, dlvae::emulator::Or());
}
inline int __any_sync(unsigned mask, int predicate) {
  return dlvae::emulator::reduce("__any_sync", mask, int(predicate != 0), dlvae::emulator::Or());
}
inline int __all_sync(unsigned mask, int predicate) {
  return dlvae::emulator::reduce("__all_sync", mask, int(predicate != 0), dlvae::emulator::And());
}
// T: int or unsigned.
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return dlvae::emulator::reduce("__reduce_add_sync", mask, value, dlvae::emulator::Add());
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return dlvae::emulator::reduce("__reduce_min_sync", mask, value, dlvae::emulator::Min());
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return dlvae::emulator::reduce("__reduce_max_sync", mask, value, dlvae::emulator::Max());
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return dlvae::emulator::reduce("__reduce_and_sync", mask, value, dlvae::emulator::And());
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return dlvae::emulator::reduce("__reduce_or_sync", mask, value, dlvae::emulator::Or());
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return dlvae::emulator::reduce("__reduce_xor_sync", mask, value, dlvae::emulator::Xor());
}
