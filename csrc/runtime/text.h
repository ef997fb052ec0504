#pragma once

#include <sstream>
#include <string>
#include <string_view>

namespace qsun {

// "name=value name=value ...", the way every Params and Config prints itself.
class Fields {
 public:
  template <typename Value>
  Fields& add(std::string_view name, const Value& value) {
    if (!empty_) text_ << ' ';
    empty_ = false;
    if (!name.empty()) text_ << name << '=';
    text_ << value;
    return *this;
  }
  std::string str() const { return text_.str(); }

 private:
  std::ostringstream text_;
  bool empty_ = true;
};

}  // namespace qsun
