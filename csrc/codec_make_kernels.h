// Fills the table of kernels for a vector layer V; included behind codec_sum.h, inside the same target region.

namespace parablock::internal {
namespace {

template <class V, Dtype kNow, Dtype kRef>
constexpr void fill_encode(Kernels& kernels) {
  constexpr int n = static_cast<int>(kNow);
  constexpr int r = static_cast<int>(kRef);
  kernels.encode[0][n][r] = &encode_plain<V, Format::kFp32, kNow, kRef>;
  kernels.encode[1][n][r] = &encode_plain<V, Format::kBf16, kNow, kRef>;
  kernels.encode[2][n][r] = &encode_groups<V, Format::kInt8, kNow, kRef>;
  kernels.encode[3][n][r] = &encode_groups<V, Format::kInt4, kNow, kRef>;
}

template <class V, Dtype kDtype>
constexpr void fill_dtype(Kernels& kernels) {
  fill_encode<V, kDtype, Dtype::kFp32>(kernels);
  fill_encode<V, kDtype, Dtype::kBf16>(kernels);
  fill_encode<V, kDtype, Dtype::kFp16>(kernels);
  constexpr int d = static_cast<int>(kDtype);
  kernels.apply[0][d] = &apply_range<V, Format::kFp32, kDtype>;
  kernels.apply[1][d] = &apply_range<V, Format::kBf16, kDtype>;
  kernels.apply[2][d] = &apply_range<V, Format::kInt8, kDtype>;
  kernels.apply[3][d] = &apply_range<V, Format::kInt4, kDtype>;
}

template <class V, Format kFormat>
constexpr void fill_format(Kernels& kernels) {
  constexpr int f = static_cast<int>(kFormat);
  kernels.decode[f] = &decode_range<V, kFormat>;
  if constexpr (has_scales(kFormat)) {
    kernels.accumulate[f] = &accumulate_groups<V, kFormat>;
    kernels.inspect[f] = &inspect_groups<V, kFormat>;
  } else {
    kernels.accumulate[f] = &accumulate_plain<V, kFormat>;
    kernels.inspect[f] = &inspect_plain<V, kFormat>;
  }
}

template <class V>
constexpr Kernels make_kernels(const char* name) {
  Kernels kernels{};
  kernels.name = name;
  fill_dtype<V, Dtype::kFp32>(kernels);
  fill_dtype<V, Dtype::kBf16>(kernels);
  fill_dtype<V, Dtype::kFp16>(kernels);
  fill_format<V, Format::kFp32>(kernels);
  fill_format<V, Format::kBf16>(kernels);
  fill_format<V, Format::kInt8>(kernels);
  fill_format<V, Format::kInt4>(kernels);
  kernels.accumulated_mean = &mean_range<V>;
  kernels.fingerprint = &fingerprint_range<V>;
  return kernels;
}

}  // namespace
}  // namespace parablock::internal
