// A stable sort on the device.
#pragma once

#include "launch.h"

namespace dlvae {

// Sorts `count` keys below 2^bits together with their places 0, 1, ...; equal keys keep their order.
void sort_places(
    const Tensor& like, const uint32_t* keys, int64_t count, int bits, uint32_t* sorted, uint32_t* places,
    const Device& device);

}  // namespace dlvae
