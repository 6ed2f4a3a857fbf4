// The matrix unit of CPUs that have one (AMX): up to 32 rows times up to 32 columns at once.
//
// A sum has one order here too, whichever rows are beside it: each instruction adds up the products of at most 32
// neighbours along the inner dimension, the even and the odd ones apart, and adds that to what was before. It is not the
// order of the vectors, so whether a product runs here must depend on shapes of the model alone, never on the number of rows.
#pragma once

#include "vectors.h"

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int TILE_ROWS = 16;     // of a tile, and its columns
constexpr int TILE_BYTES = 64;    // of a row of a tile
constexpr int MOST_TILED = 32;    // rows of one product: two tiles
constexpr int TILE_INNER = 32;    // neighbours along the inner dimension, in bfloat16

// Lines of what is multiplied: row by row, `stride` bytes from one to the next and `step` from what one instruction takes
// to what the next does.
struct TiledRows {
  const void* first;
  long stride, step;
};

// Where the sums lie, `stride` bytes from one row to the next; the right 16 columns follow the left ones.
struct TiledSums {
  float* first;
  long stride;
};

#if defined(__AMX_BF16__)

// As one thread uses it, for one task: what is set up in it belongs to whoever calls, as the ABI has it.
class MatrixUnit {
 public:
  static constexpr bool EXISTS = true;

  // Whether the system lets this process use it, which has to be asked for once.
  static bool permitted() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  }

  MatrixUnit() = default;
  MatrixUnit(const MatrixUnit&) = delete;
  ~MatrixUnit() {
    if (rows_) _tile_release();
  }

  // For products of so many rows, up to MOST_TILED, of which an instruction takes `num_pairs` pairs of neighbours, up to 16.
  void prepare(long rows, int num_pairs) {
    if (rows == rows_ && num_pairs == num_pairs_) return;
    rows_ = rows;
    num_pairs_ = num_pairs;
    Shapes shapes{};
    shapes.palette = 1;
    auto shape = [&](int tile, long num_rows, int row_bytes) {
      shapes.rows[tile] = (uint8_t)num_rows;
      shapes.row_bytes[tile] = (uint16_t)row_bytes;
    };
    long upper = rows < TILE_ROWS ? rows : TILE_ROWS, lower = rows > TILE_ROWS ? rows - TILE_ROWS : 1;
    for (int column = 0; column < 2; column++) {
      shape(column, upper, TILE_BYTES);
      shape(2 + column, lower, TILE_BYTES);
      shape(6 + column, num_pairs, TILE_BYTES);
    }
    shape(4, upper, 4 * num_pairs);
    shape(5, lower, 4 * num_pairs);
    settle();
    _tile_loadconfig(&shapes);
    settle();
  }

  // sums (+)= rows times columns, over num_steps instructions. columns(k): where the left and the right columns of the
  // k-th lie, [num_pairs][16][2], `stride` bytes from one pair to the next; fetch(k) is called beside it.
  template <bool ADD, class C, class F>
  void multiply(TiledRows rows, long num_steps, long stride, bool right, const C& columns, TiledSums sums, const F& fetch) {
    if (rows_ > TILE_ROWS) {
      if (right) multiply<ADD, true, true>(rows, num_steps, stride, columns, sums, fetch);
      else multiply<ADD, true, false>(rows, num_steps, stride, columns, sums, fetch);
    } else {
      if (right) multiply<ADD, false, true>(rows, num_steps, stride, columns, sums, fetch);
      else multiply<ADD, false, false>(rows, num_steps, stride, columns, sums, fetch);
    }
  }

 private:
  // As the instructions read it.
  struct Shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Shapes) == 64);

  // The intrinsics do not tell the compiler what memory they read.
  static inline void settle() { asm volatile("" ::: "memory"); }

  template <bool ADD, bool LOWER, bool RIGHT, class C, class F>
  static inline void multiply(TiledRows rows, long num_steps, long stride, const C& columns, TiledSums sums, const F& fetch) {
    settle();
    auto *upper = (const char*)rows.first, *lower = upper + TILE_ROWS * rows.stride;
    auto *above = (char*)sums.first, *below = above + TILE_ROWS * sums.stride;
    if constexpr (ADD) {
      _tile_loadd(0, above, sums.stride);
      if (RIGHT) _tile_loadd(1, above + TILE_BYTES, sums.stride);
      if (LOWER) _tile_loadd(2, below, sums.stride);
      if (LOWER && RIGHT) _tile_loadd(3, below + TILE_BYTES, sums.stride);
    } else {
      _tile_zero(0);
      if (RIGHT) _tile_zero(1);
      if (LOWER) _tile_zero(2);
      if (LOWER && RIGHT) _tile_zero(3);
    }
    for (long k = 0; k < num_steps; k++, upper += rows.step, lower += rows.step) {
      auto [left_columns, right_columns] = columns(k);
      fetch(k);
      _tile_loadd(4, upper, rows.stride);
      _tile_loadd(6, left_columns, stride);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (RIGHT) {
        _tile_loadd(7, right_columns, stride);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (LOWER) {
        _tile_loadd(5, lower, rows.stride);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (LOWER && RIGHT) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, above, sums.stride);
    if (RIGHT) _tile_stored(1, above + TILE_BYTES, sums.stride);
    if (LOWER) _tile_stored(2, below, sums.stride);
    if (LOWER && RIGHT) _tile_stored(3, below + TILE_BYTES, sums.stride);
  }

  long rows_ = 0;
  int num_pairs_ = 0;
};

#else

struct MatrixUnit {
  static constexpr bool EXISTS = false;
  static bool permitted() { return true; }
  void prepare(long, int) {}
  template <bool ADD, class C, class F> void multiply(TiledRows, long, long, bool, const C&, TiledSums, const F&) {}
};

#endif

}  // namespace
